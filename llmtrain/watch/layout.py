"""The file in which a rank notes what it does, in the memory of its host, where its neighbours read it.

The main thread writes numbers at fixed places, so that they are exact even if the process is stopped a moment
later. The watching thread writes a text (JSON) beside them: the Python stack, and what the numbers mean.

    offset    content
    0         HEAD      process
    64        PROGRESS  step, micro-batch and phase
    128       CALL      the last collective
    256       BEAT      the watching thread's sign of life
    512       COUNTS    collectives so far, by group
    4096      TEXT      length, checksum, JSON
    65536     RING      with debug.collectives: the last collectives, with their shapes
"""

from __future__ import annotations

import json
import os
import zlib
from dataclasses import dataclass, field
from pathlib import Path
from struct import Struct
from typing import Any, NamedTuple

import numpy as np

HEAD = Struct("<8sqqq")
"""Magic, process id, rank, and when the kernel started the process."""
PROGRESS = Struct("<qqqqqd")
"""Ticks, step, micro-batch, phase, whether the first step is done, since when."""
CALL = Struct("<qqqqqqqd")
"""Ticks, place of the group, kind, number within the group, bytes, peer, whether the rank waits for it, since
when."""
BEAT = Struct("<dq")
"""Time of the thread's last sign of life; whether the rank takes no part any more (see GONE)."""
COUNT = Struct("<Qq")
"""Key of a group; calls in it so far."""
TEXT = Struct("<II")

HEAD_AT, PROGRESS_AT, CALL_AT, BEAT_AT, COUNTS_AT, TEXT_AT, RING_AT = 0, 64, 128, 256, 512, 4096, 65536
MAGIC = b"watch 1\0"
MAX_GROUPS = (TEXT_AT - COUNTS_AT) // COUNT.size
"""Groups that are counted apart; the last place is for all that come after."""
MAX_TEXT = RING_AT - TEXT_AT - TEXT.size

PHASES = ("start", "step", "data", "forward", "backward", "optimizer", "evaluation", "save", "end")
TAKES_PART, FAILED, GONE = 0, 1, 2
"""Of a rank: it is watched; it ends because of an error; it has ended or will, as it should."""

RING_CALLS = 8192
"""Collectives that a rank's ring holds."""
RECORD = np.dtype(
    [
        ("key", "<u8"),
        ("number", "<i8"),
        ("chain", "<u4"),
        ("place", "<u4"),
        ("step", "<i4"),
        ("micro", "<i4"),
        ("kind", "u1"),
        ("dtype", "u1"),
        ("dims", "u1"),
        ("op", "u1"),
        ("pad", "<u4"),
        ("shape", "<i8", (4,)),
    ]
)
"""One collective. chain: checksum of all calls of this group so far; place: number of the source line."""


class Kind(NamedTuple):
    """A kind of collective."""

    name: str
    argument: int | None
    """Which argument of ProcessGroup's method has the tensors that are alike on all ranks, or None."""
    same_shape: bool = True
    """Whether ranks must agree on the shape."""


KINDS: dict[str, Kind] = {
    "allreduce": Kind("all_reduce", 0),
    "allreduce_coalesced": Kind("all_reduce", 0),
    "broadcast": Kind("broadcast", 0),
    "reduce": Kind("reduce", 0),
    "allgather": Kind("all_gather", 1),
    "allgather_coalesced": Kind("all_gather", 1),
    "_allgather_base": Kind("all_gather", 1),
    "all_gather_single": Kind("all_gather", 1),
    "all_gather_single_coalesced": Kind("all_gather", 1),
    "allgather_into_tensor_coalesced": Kind("all_gather", 1),
    "gather": Kind("gather", 1),
    "scatter": Kind("scatter", 0),
    "reduce_scatter": Kind("reduce_scatter", 0),
    "_reduce_scatter_base": Kind("reduce_scatter", 0),
    "reduce_scatter_single": Kind("reduce_scatter", 0),
    "reduce_scatter_single_coalesced": Kind("reduce_scatter", 0),
    "reduce_scatter_tensor_coalesced": Kind("reduce_scatter", 0),
    "alltoall": Kind("all_to_all", 1, False),
    "alltoall_base": Kind("all_to_all", 1, False),
    "all_to_all_single": Kind("all_to_all", 1, False),
    "barrier": Kind("barrier", None),
    "monitored_barrier": Kind("barrier", None),
    "send": Kind("send", 0),
    "recv": Kind("recv", 0),
    "recv_anysource": Kind("recv", 0, False),
}
"""Method of torch's ProcessGroup → the kind of collective."""
KIND_NAMES = tuple(dict.fromkeys(kind.name for kind in KINDS.values()))


@dataclass
class Call:
    """The last collective of a rank."""

    kind: str
    key: int
    """Of its group, the same on all its ranks."""
    ranks: tuple[int, ...]
    """The ranks of the group; of a send or recv, its two ends."""
    number: int
    """Counted from 1 within the group."""
    size: int
    """Bytes that this rank gives or gets."""
    waits: bool
    age: float
    """Seconds since it began, or since the rank has waited for it."""


@dataclass
class RankState:
    """The known state of a rank."""

    rank: int
    host: str
    pid: int
    started: int
    """When the kernel started the process, which tells it from a later one of the same number."""
    ticks: int
    """Grows with whatever the rank does."""
    step: int = 0
    micro: int = -1
    phase: str = "start"
    phase_age: float = 0.0
    is_warm: bool = False
    """Whether its first step is done."""
    call: Call | None = None
    counts: dict[int, int] = field(default_factory=dict)
    """Key of a group → collectives so far."""
    silence: float = 0.0
    """Seconds since the last sign of life of its watching thread."""
    part: int = TAKES_PART
    process: str = "running"
    """What the kernel says of the process."""
    wait: str = ""
    """Function of the kernel in which it waits, where that may be read."""
    stack: list[tuple[str, int, str]] = field(default_factory=list)
    """File, line and function of the main thread's frames, the innermost last."""
    stack_age: float = 0.0

    @property
    def name(self) -> str:
        return f"rank {self.rank} on {self.host}"

    def encode(self) -> dict[str, Any]:
        """Return the state as JSON."""
        call = None if self.call is None else vars(self.call)
        return {**vars(self), "call": call, "counts": {str(key): n for key, n in self.counts.items()}}

    @staticmethod
    def decode(said: dict[str, Any]) -> RankState:
        """Decode the result of `encode`."""
        call = said["call"]
        return RankState(
            **{
                **said,
                "call": None if call is None else Call(**{**call, "ranks": tuple(call["ranks"])}),
                "counts": {int(key): number for key, number in said["counts"].items()},
                "stack": [(file, line, function) for file, line, function in said["stack"]],
            }
        )


def size_of(with_ring: bool) -> int:
    """Return the bytes of a rank's file."""
    return RING_AT + (16 + RING_CALLS * RECORD.itemsize if with_ring else 0)


def write_text(buffer: Any, text: dict[str, Any]) -> None:
    """Write the text part; what is too long is left out."""
    content = json.dumps(text).encode()
    if len(content) <= MAX_TEXT:
        buffer[TEXT_AT + TEXT.size : TEXT_AT + TEXT.size + len(content)] = content
        TEXT.pack_into(buffer, TEXT_AT, len(content), zlib.crc32(content))


def read_text(content: bytes) -> dict[str, Any]:
    """Return the text part; empty if it is just being written."""
    length, checksum = TEXT.unpack_from(content, TEXT_AT)
    text = content[TEXT_AT + TEXT.size : TEXT_AT + TEXT.size + min(length, MAX_TEXT)]
    if not length or zlib.crc32(text) != checksum:
        return {}
    found: dict[str, Any] = json.loads(text)
    return found


def read_state(path: Path, host: str, now: float) -> RankState | None:
    """Return the state in a rank's file; None for a file that is not complete.

    now: time.monotonic(), which all processes of a host share.
    """
    try:
        with path.open("rb") as file:
            content = file.read(RING_AT)
    except OSError:
        return None
    if len(content) < RING_AT or not content.startswith(MAGIC):
        return None
    _, pid, rank, started = HEAD.unpack_from(content, HEAD_AT)
    ticks, step, micro, phase, is_warm, since = PROGRESS.unpack_from(content, PROGRESS_AT)
    calls, place, kind, number, size, peer, waits, call_since = CALL.unpack_from(content, CALL_AT)
    beat, part = BEAT.unpack_from(content, BEAT_AT)
    counts, keys = {}, []
    for i in range(MAX_GROUPS):
        key, count = COUNT.unpack_from(content, COUNTS_AT + i * COUNT.size)
        keys.append(key)
        if key:
            counts[key] = count
    text = read_text(content)
    call = None
    if number:
        ranks = tuple(text.get("groups", {}).get(str(place), ()))
        ranks = tuple(sorted({rank, peer})) if peer >= 0 else ranks
        age = max(0.0, now - call_since)
        call = Call(KIND_NAMES[kind], keys[place], ranks, number, size, bool(waits), age)
    return RankState(
        rank,
        host,
        pid,
        started,
        ticks + calls,
        step,
        micro,
        PHASES[phase],
        max(0.0, now - since),
        bool(is_warm),
        call,
        counts,
        max(0.0, now - beat),
        part,
        stack=[(file, line, function) for file, line, function in text.get("stack", ())],
        stack_age=max(0.0, now - text.get("at", now)),
    )


def read_ring(path: Path) -> tuple[np.ndarray, list[str]]:
    """Return the collectives in a rank's ring, RECORD (n,), oldest first, and the source lines that their
    places number."""
    empty = np.zeros(0, RECORD)
    try:
        content = path.read_bytes()
    except OSError:
        return empty, []
    if len(content) < size_of(True):
        return empty, []
    total = int.from_bytes(content[RING_AT : RING_AT + 8], "little")
    records = np.frombuffer(content, RECORD, RING_CALLS, RING_AT + 16)
    if total > RING_CALLS:
        records = np.roll(records, -(total % RING_CALLS))
    return records[: min(total, RING_CALLS)], read_text(content).get("places", [])


def create(path: Path, with_ring: bool) -> int:
    """Create a rank's file, full of zeros, for this user alone; return its descriptor. Raise OSError if the
    memory is full."""
    file = os.open(path, os.O_RDWR | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW, 0o600)
    try:
        # Its memory is taken now: a page that cannot be had later would end the process by SIGBUS.
        os.posix_fallocate(file, 0, size_of(with_ring))
    except BaseException:
        os.close(file)
        path.unlink()
        raise
    return file
