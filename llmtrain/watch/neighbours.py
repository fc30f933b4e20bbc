"""Read the files of the ranks of one host."""

from __future__ import annotations

import faulthandler
import mmap
import os
import re
import shutil
import signal
import struct
import tempfile
import time
from contextlib import suppress
from pathlib import Path
from typing import IO, NamedTuple

from llmtrain.watch import kernel, layout
from llmtrain.watch.layout import RankState

MEMORY = Path("/dev/shm")  # noqa: S108
"""The folder below it has a random name, and is for this user alone."""
PREFIX = "llmtrain-watch-"
DUMP_SIGNAL = signal.SIGRTMIN + 9
"""Makes a rank write its Python stack, even while a call holds Python's lock."""
DUMP_SECONDS = 0.5
SILENT_SECONDS = 2.0
"""A rank whose thread has been silent for so long is asked for its stack by DUMP_SIGNAL."""
_FRAME = re.compile(r'  File "(.*)", line (\d+) in (.*)')


class Brief(NamedTuple):
    """What is read of each rank twice a second."""

    ticks: int
    part: int
    silence: float


def memory() -> Path:
    """Return the folder in memory below which the files of this host lie; without one, that of temporary
    files."""
    return MEMORY if MEMORY.is_dir() and os.access(MEMORY, os.W_OK) else Path(tempfile.gettempdir())


class Folder:
    """The folder of one run's ranks on this host."""

    def __init__(self, token: str, host: str, own: int, ranks: list[int]) -> None:
        """token: random, the same on all ranks. own: this rank. ranks: those of this host."""
        root = memory()
        _remove_leftovers(root)
        self.path = root / f"{_prefix()}{token}"
        self.path.mkdir(mode=0o700, exist_ok=True)
        self.host, self.own, self.ranks = host, own, ranks
        self._maps: dict[int, mmap.mmap] = {}
        self._traces: IO[str] | None = None

    def file_of(self, rank: int) -> Path:
        return self.path / f"rank{rank}"

    @property
    def end(self) -> Path:
        """The file that says that the job ends."""
        return self.path / "end"

    def open_traces(self) -> None:
        """Have DUMP_SIGNAL write this process's stack into a file of the folder."""
        with suppress(OSError, ValueError, RuntimeError):
            self._traces = self._trace_of(self.own).open("w")
            faulthandler.register(DUMP_SIGNAL, self._traces, all_threads=False)

    def _trace_of(self, rank: int) -> Path:
        return self.path / f"rank{rank}.trace"

    def close(self) -> None:
        """Remove what this rank has in the folder, and the folder after the last rank."""
        if self._traces is not None:
            faulthandler.unregister(DUMP_SIGNAL)
            self._traces.close()
        for file in (self.file_of(self.own), self._trace_of(self.own)):
            with suppress(OSError):
                file.unlink()
        with suppress(OSError):
            self.path.rmdir()

    def briefs(self, now: float) -> dict[int, Brief]:
        """Return rank → its state, for the ranks of this host that have begun to record it. GONE: its file
        was
        removed."""
        found = {}
        for rank in self.ranks:
            content = self._map(rank)
            if content is None:
                continue
            if rank != self.own and not self.file_of(rank).exists():
                found[rank] = Brief(0, layout.GONE, 0.0)
                continue
            (ticks, *_), (calls, *_) = (
                layout.PROGRESS.unpack_from(content, layout.PROGRESS_AT),
                layout.CALL.unpack_from(content, layout.CALL_AT),
            )
            beat, part = layout.BEAT.unpack_from(content, layout.BEAT_AT)
            found[rank] = Brief(ticks + calls, part, max(0.0, now - beat))
        return found

    def _map(self, rank: int) -> mmap.mmap | None:
        if rank not in self._maps:
            with suppress(OSError, ValueError), self.file_of(rank).open("rb") as file:
                if os.fstat(file.fileno()).st_size >= layout.RING_AT:
                    self._maps[rank] = mmap.mmap(file.fileno(), layout.RING_AT, access=mmap.ACCESS_READ)
        return self._maps.get(rank)

    def states(self, now: float) -> list[RankState]:
        """Return the states that the ranks of this host record, without those of the kernel."""
        found = (layout.read_state(self.file_of(rank), self.host, now) for rank in self.ranks)
        return [state for state in found if state is not None]

    def examined(self) -> list[RankState]:
        """Return the same with what the kernel says of each process, and with the stacks of ranks whose
        threads are silent."""
        states = self.states(time.monotonic())
        silent = []
        for state in states:
            state.process, state.wait = kernel.state_of(state.pid, state.started), kernel.wait_of(state.pid)
            hears = state.process not in (kernel.ENDED, kernel.STOPPED)
            if state.silence > SILENT_SECONDS and hears and self._trace_of(state.rank).exists():
                with suppress(OSError):
                    os.kill(state.pid, DUMP_SIGNAL)
                    silent.append(state)
        if silent:
            time.sleep(DUMP_SECONDS)
        for state in silent:
            with suppress(OSError):
                text = self._trace_of(state.rank).read_text(errors="replace")
                lines = text.rpartition("(most recent call first)")[2].splitlines()
                frames = [_FRAME.match(line) for line in lines]
                stack = [(found[1], int(found[2]), found[3]) for found in frames if found is not None]
                if stack:
                    state.stack, state.stack_age = stack[::-1], 0.0
        return states


def _prefix() -> str:
    """Return how the names of folders begin whose processes this one can see."""
    processes = 0
    with suppress(OSError):
        processes = os.stat("/proc/self/ns/pid").st_ino
    return f"{PREFIX}{os.getuid()}-{processes}-"


def _remove_leftovers(root: Path) -> None:
    """Remove the folders of runs of this user whose processes have all ended: killed ranks leave them."""
    for folder in root.glob(f"{_prefix()}*"):
        with suppress(OSError, struct.error):  # a file that was just made is empty
            files = [*folder.glob("rank*[0-9]")]
            heads = [layout.HEAD.unpack_from(file.read_bytes()) for file in files]
            ended = [kernel.state_of(pid, started) == kernel.ENDED for _, pid, _, started in heads if pid]
            if ended and len(ended) == len(files) and all(ended):
                shutil.rmtree(folder, ignore_errors=True)
