"""Record what this rank does: the step, the phase, and its collectives.

Called by the main thread; in a backward pass on a GPU by the thread of autograd, for which the main thread
waits.
"""

from __future__ import annotations

import contextlib
import hashlib
import mmap
import os
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch.distributed as dist

from llmtrain.watch import kernel, layout
from llmtrain.watch.clock import Clock
from llmtrain.watch.ring import Ring, tensors_of

START, STEP, END = (layout.PHASES.index(name) for name in ("start", "step", "end"))
COMMUNICATION = len(layout.PHASES)
"""Number under which the clock counts the time in collectives."""
OF_A_PAIR = ("send", "recv")
MAX_PENDING = 4096
"""Collectives begun that are remembered until somebody waits for them; nobody waits for some."""
MAX_FRAMES = 60
KIND_NUMBERS = {name: number for number, name in enumerate(layout.KIND_NAMES)}

current: Recorder | None = None
"""The recorder of this process, while a watch is open."""


class Recorder:
    """What this rank does, in its file and in this process."""

    def __init__(self, path: Path, rank: int, *, with_ring: bool = False, clock: Clock | None = None) -> None:
        """path: of the file, which must not exist. clock: measures times of phases."""
        self.path = path
        file = layout.create(path, with_ring)
        try:
            self.buffer = mmap.mmap(file, layout.size_of(with_ring))
        finally:
            os.close(file)
        self.rank = rank
        self.clock = clock
        self.step, self.micro = 0, -1
        self.groups: dict[int, tuple[int, ...]] = {}
        """Place of a group → its ranks."""
        self.places: list[str] = []
        """Source lines by number, with a ring."""
        self.thread = 0
        """The thread that is inside a collective; 0: none is."""
        self._phases = [START]
        self.is_warm = False
        """Whether the first step is done."""
        self._progress = self._calls = 0
        self._group_places: dict[str, tuple[int, int, int]] = {}
        self._counts = [0] * layout.MAX_GROUPS
        self._last: tuple[int, int, int, int, int] = (0, 0, 0, 0, -1)
        self._pending: dict[int, tuple[int, int, int, int, int]] = {}
        self._ring: Ring | None = Ring(self.buffer, self.places) if with_ring else None
        pid = os.getpid()
        layout.HEAD.pack_into(self.buffer, layout.HEAD_AT, layout.MAGIC, pid, rank, kernel.start_of(pid))
        self.beat(layout.TAKES_PART)
        self._write_progress()

    def close(self) -> None:
        """Remove the file."""
        with contextlib.suppress(OSError):
            self.path.unlink()

    def beat(self, part: int) -> None:
        """Give a sign of life. part: one of TAKES_PART, FAILED, GONE."""
        layout.BEAT.pack_into(self.buffer, layout.BEAT_AT, time.monotonic(), part)

    # Progress

    @property
    def phase(self) -> str:
        return layout.PHASES[self._phases[-1]]

    def enter(self, phase: int) -> None:
        self._phases.append(phase)
        self._write_progress()

    def leave(self) -> None:
        self._phases.pop()
        self._write_progress()

    def begin_step(self, step: int) -> None:
        self.is_warm = self._phases[0] == STEP
        self._phases = [STEP]
        self.step, self.micro = step, -1
        self._write_progress()

    def end_steps(self) -> None:
        self._phases = [END]
        self.micro = -1
        self._write_progress()

    def go_on(self) -> None:
        self._write_progress()

    def begin_micro_batch(self, number: int) -> None:
        self.micro = number
        self._write_progress()

    def _write_progress(self) -> None:
        self._progress += 1
        phase = self._phases[-1]
        layout.PROGRESS.pack_into(
            self.buffer,
            layout.PROGRESS_AT,
            self._progress,
            self.step,
            self.micro,
            phase,
            self.is_warm,
            time.monotonic(),
        )
        if self.clock is not None:
            self.clock.mark(phase)

    # Collectives

    def begin_call(self, group: Any, method: str, arguments: tuple[Any, ...]) -> None:
        """Note that this rank calls a method of a ProcessGroup."""
        kind = layout.KINDS[method]
        tensors = tensors_of(arguments, kind.argument)
        peer = -1
        if kind.name in OF_A_PAIR and method != "recv_anysource":
            members = _ranks_of(group)
            peer = members[arguments[1]] if arguments[1] < len(members) else -1
        place, key, of_ranks = self._place_of(group, kind.name, peer)
        self._counts[place] = number = self._counts[place] + 1
        size = tensors[0].nbytes if len(tensors) == 1 else sum(tensor.nbytes for tensor in tensors)
        number_of_kind = KIND_NUMBERS[kind.name]
        self._last = (place, number_of_kind, number, size, peer)
        if self._ring is not None:
            self._ring.add(of_ranks, number_of_kind, kind, tensors, arguments, self.step, self.micro)
        layout.COUNT.pack_into(self.buffer, layout.COUNTS_AT + place * layout.COUNT.size, key, number)
        self.thread = threading.get_ident()
        self._write_call(True, self._last)
        if self.clock is not None:
            self.clock.mark(COMMUNICATION)

    def end_call(self, work: Any) -> None:
        """Note that the method returned; `work` is what may be waited for."""
        if work is not None:
            if len(self._pending) > MAX_PENDING:
                self._pending.clear()
            self._pending[id(work)] = self._last
        self._end()

    def begin_wait(self, work: Any) -> None:
        """Note that this rank waits for a collective."""
        self.thread = threading.get_ident()
        self._write_call(True, self._pending.pop(id(work), self._last))
        if self.clock is not None:
            self.clock.mark(COMMUNICATION)

    def end_wait(self) -> None:
        """Note that the wait is over."""
        self._end()

    def _end(self) -> None:
        self.thread = 0
        self._write_call(False, self._last)
        if self.clock is not None:
            self.clock.mark(self._phases[-1])

    def _write_call(self, waits: bool, call: tuple[int, int, int, int, int]) -> None:
        self._calls += 1
        layout.CALL.pack_into(self.buffer, layout.CALL_AT, self._calls, *call, waits, time.monotonic())

    def _place_of(self, group: Any, kind: str, peer: int) -> tuple[int, int, int]:
        """Return the place of a group, or of a pair of its ranks; the key that all its ranks have for it; and
        the key of its set of ranks, which several groups may have."""
        name, pair = group.group_name, ""
        if kind in OF_A_PAIR:
            pair = f"{self.rank}>{peer}" if kind == "send" else f"{peer}>{self.rank}"
            name = f"{name} {pair}"
        found = self._group_places.get(name)
        if found is None:
            place = min(len(self._group_places), layout.MAX_GROUPS - 1)
            self.groups[place] = ranks = tuple(sorted(_ranks_of(group)))
            # The last place counts several groups together, which nobody can compare.
            key = 0 if place == layout.MAX_GROUPS - 1 else _digest(f"{name} {ranks}")
            of_ranks = _digest(pair or str(ranks))
            found = self._group_places[name] = place, key, of_ranks
        return found

    def write_text(self, now: float) -> None:
        """Write the stack of the main thread, and what numbers mean. For the watching thread."""
        layout.write_text(
            self.buffer,
            {
                "at": now,
                "stack": self.stack(),
                "groups": {str(place): ranks for place, ranks in list(self.groups.items())},
                "places": self.places[:],
            },
        )

    def stack(self) -> list[tuple[str, int, str]]:
        """Return file, line and function of each frame of the main thread, the innermost last; of the thread
        that is inside a collective, if the main thread waits for another one."""
        frames = sys._current_frames()
        chosen = self.thread if self.thread in frames else threading.main_thread().ident
        return list(_frames(frames.get(chosen or 0)))[::-1]


def _digest(text: str) -> int:
    """Return a number of 64 bits that is not 0."""
    return int.from_bytes(hashlib.blake2b(text.encode(), digest_size=8).digest(), "little") or 1


def _ranks_of(group: Any) -> list[int]:
    """Return the ranks of a group; none of one that torch.distributed does not know."""
    with contextlib.suppress(KeyError, ValueError, RuntimeError):
        return list(dist.get_process_group_ranks(group))
    return []


def _frames(frame: Any) -> Iterator[tuple[str, int, str]]:
    for _ in range(MAX_FRAMES):
        if frame is None:
            return
        yield frame.f_code.co_filename, frame.f_lineno, frame.f_code.co_name
        frame = frame.f_back
