"""Coordinate the processes of one prepare job, on one or more hosts, through files in the shared output
folder.

They use files in OUTPUT/.prepare/peers only: no port, no process group. `job.json` names the job and, once
all processes have joined, its members. Each process writes its progress and, every HEARTBEAT_SECONDS, a
heartbeat to its own file. A process that waits for another whose heartbeat has stopped, or that reports a
failure, raises an error that names it. Ages are measured by the reader's clock, so clocks of hosts may
differ.
"""

from __future__ import annotations

import json
import os
import secrets
import socket
import threading
import time
from collections.abc import Callable, Iterable, Iterator
from contextlib import suppress
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any, TypeVar

import psutil

from llmtrain.errors import DataError, Problem, UserError
from llmtrain.prepare.files import write_marker

HEARTBEAT_SECONDS = 2.0
SHORTEST_POLL, LONGEST_POLL = 0.01, 1.0
"""Seconds between two reads of the other processes' files; the interval grows while nothing changes."""
FOLDER = "peers"

T = TypeVar("T")


class LostPeerError(DataError):
    """Another process of the job has ended or stopped responding."""


@dataclass(frozen=True)
class _State:
    """The contents of the file of a process."""

    nonce: str
    host: str
    pid: int
    pid_namespace: str
    """Identifies boot and PID namespace: processes with equal values see each other's pid."""
    beat: int = 0
    barrier: int = 0
    """Number of barriers that the process has reached."""
    message: str = ""
    """Its message at this barrier."""
    previous_message: str = ""
    """Its message at the barrier before: a slow reader may find it one barrier ahead."""
    left: bool = False
    """Whether it has finished writing."""
    failed: list[dict[str, str]] | None = None
    """Problems of the error that ended it."""
    everywhere: bool | None = None
    """Whether rank 0 prints the error for all ranks."""

    @property
    def is_gone(self) -> bool:
        """Whether this process can see that the other one no longer exists."""
        if not self.pid_namespace or self.pid_namespace != _pid_namespace():
            return False
        try:
            return psutil.Process(self.pid).status() == psutil.STATUS_ZOMBIE
        except psutil.NoSuchProcess:
            return True


class Peers:
    """This process as one of the `size` processes of a job. With one process, no method writes or waits.

    job: name of the job, given by the launcher, equal in all its processes.
    seconds: time without a heartbeat after which another process counts as lost.
    """

    def __init__(self, work: Path, rank: int = 0, size: int = 1, job: str = "", seconds: float = 600) -> None:
        self.rank, self.size = rank, size
        self._folder = work / FOLDER
        self._job, self._seconds = job, seconds
        self._id = ""
        self._state = _State(secrets.token_hex(8), socket.gethostname(), os.getpid(), _pid_namespace())
        self._seen: dict[int, tuple[_State, float]] = {}
        self._checked = 0.0
        self._lock = threading.Lock()
        self._ended = threading.Event()
        self._heart: threading.Thread | None = None

    def is_mine(self, number: int) -> bool:
        """Return whether this process does the piece of work of this number."""
        return number % self.size == self.rank

    def meet(self) -> None:
        """Wait until all processes have joined: rank 0 announces the job, the others answer.

        Raise DataError if a process does not join in time.
        """
        if self.size == 1:
            return
        if self.rank == 0:
            self._announce()
        else:
            self._join()
        self._heart = threading.Thread(target=self._beat, daemon=True)
        self._heart.start()

    def barrier(self, message: str = "") -> str:
        """Wait until all processes have called this; return the `message` of rank 0 on all of them.

        Raise DataError if a process failed or is lost.
        """
        if self.size == 1:
            return message
        barrier = self._state.barrier + 1
        self._write(barrier=barrier, message=message, previous_message=self._state.message)
        self._await(lambda state: state.barrier >= barrier)
        leader = self._state if self.rank == 0 else self._seen[0][0]
        # Rank 0 is at most one barrier ahead: there it waits for this process.
        return leader.message if leader.barrier == barrier else leader.previous_message

    def check(self) -> None:
        """Raise DataError if another process failed or is lost. Reads files every HEARTBEAT_SECONDS at
        most."""
        if self.size > 1 and time.monotonic() - self._checked > HEARTBEAT_SECONDS:
            self._checked = time.monotonic()
            for rank in self._others():
                self._check_rank(rank)

    def await_visible(self, find: Callable[[int], T | None], numbers: Iterable[int]) -> Iterator[T]:
        """Yield find(number) of each number; wait while it is None, until this host sees the file of another
        host.

        Raise DataError if the file does not become visible in time.
        """
        for number in numbers:
            deadline, pause = time.monotonic() + self._seconds, SHORTEST_POLL
            while (found := find(number)) is None:
                if self.is_mine(number) or time.monotonic() > deadline:
                    owner = number % self.size
                    host = self._state.host if self.is_mine(number) else self._seen[owner][0].host
                    got = f"finished work of rank {owner} on {host} that {self._state.host} does not see"
                    remedy = "share one output folder between all hosts, then run the same command again"
                    raise DataError(Problem(str(self._folder.parent), got, remedy=remedy))
                time.sleep(pause)
                pause = min(2 * pause, LONGEST_POLL)
            yield found

    def leave(self, failure: UserError | None = None) -> None:
        """Stop writing. With `failure`, make the other processes raise it too."""
        if self.size == 1 or not self._id:
            return
        self._ended.set()
        if self._heart is not None:
            self._heart.join()
        failed = None
        if failure is not None:
            failed = [asdict(problem) for problem in failure.problems]
            failure.everywhere = None if isinstance(failure, LostPeerError) else True
        # Rank 0 may have removed the folder.
        with suppress(OSError):
            self._write(left=True, failed=failed, everywhere=failure and failure.everywhere)

    def await_end(self) -> None:
        """Wait after `leave`: on rank 0 until all others have left, elsewhere until rank 0 has finished the
        corpus.

        Raise DataError if rank 0 failed or is lost.
        """
        if self.size == 1:
            return
        if self.rank == 0:
            for rank in self._others():
                # A process that died by now had already done its work.
                with suppress(DataError):
                    self._await(lambda state: state.left, ranks=[rank])
            return
        self._seen.clear()
        self._await(lambda state: state.left, ranks=[0], until=lambda: self._read_job() is None)

    # --------------------------------------------------------------------------------------- files

    def _path(self, rank: int) -> Path:
        return self._folder / f"{self._id}-{rank:05d}.json"

    def _write(self, **changes: Any) -> None:
        with self._lock:
            self._state = replace(self._state, beat=self._state.beat + 1, **changes)
            write_marker(self._path(self.rank), asdict(self._state))

    def _read(self, rank: int) -> _State | None:
        try:
            return _State(**json.loads(self._path(rank).read_text()))
        except (OSError, ValueError):
            return None

    def _read_job(self) -> dict[str, Any] | None:
        try:
            return json.loads((self._folder / "job.json").read_text())
        except (OSError, ValueError):
            return None

    def _beat(self) -> None:
        while not self._ended.wait(HEARTBEAT_SECONDS):
            # Ignore a disk that is full for a moment: the work itself raises the error if it stays full.
            with suppress(OSError):
                self._write()

    def _others(self) -> list[int]:
        return [rank for rank in range(self.size) if rank != self.rank]

    # ------------------------------------------------------------------------------------- joining

    def _announce(self) -> None:
        self._folder.mkdir(exist_ok=True)
        self._id = secrets.token_hex(8)
        for leftover in self._folder.glob("*.json"):
            leftover.unlink(missing_ok=True)
        call = {"job": self._job, "id": self._id, "size": self.size, "members": None}
        write_marker(self._folder / "job.json", call)
        self._write()
        present = lambda: {rank: state for rank in self._others() if (state := self._read(rank))}  # noqa: E731
        for _ in self._polls():
            if len(here := present()) == self.size - 1:
                break
        else:
            missing = [str(rank) for rank in self._others() if rank not in here]
            raise self._absent(f"rank{'s' if len(missing) > 1 else ''} {', '.join(missing)} of {self.size}")
        call["members"] = [here[rank].nonce if rank else self._state.nonce for rank in range(self.size)]
        write_marker(self._folder / "job.json", call)

    def _join(self) -> None:
        for _ in self._polls():
            call = self._read_job()
            if call is None or (call["job"], call["size"]) != (self._job, self.size):
                continue
            if call["members"] is None and call["id"] != self._id:
                self._id = call["id"]
                with suppress(OSError):
                    self._write()
            elif call["members"] and call["members"][self.rank] == self._state.nonce:
                return
        raise self._absent("rank 0")

    def _absent(self, who: str) -> DataError:
        got = f"no answer from {who} within {self._seconds:g} s"
        remedy = "start all processes with one output folder that all hosts see"
        return DataError(Problem(str(self._folder.parent.parent), got, remedy=remedy))

    def _polls(self) -> Iterator[None]:
        """Yield at growing intervals until the timeout."""
        deadline, pause = time.monotonic() + self._seconds, SHORTEST_POLL
        while time.monotonic() < deadline:
            yield
            time.sleep(pause)
            pause = min(1.5 * pause, LONGEST_POLL)

    # ------------------------------------------------------------------------------------- waiting

    def _await(
        self,
        ready: Callable[[_State], bool],
        ranks: Iterable[int] | None = None,
        until: Callable[[], bool] = lambda: False,
    ) -> None:
        now = time.monotonic()
        self._seen = {rank: (state, now) for rank, (state, _) in self._seen.items()}
        waiting, pause = list(self._others() if ranks is None else ranks), SHORTEST_POLL
        while not until():
            states = {rank: self._check_rank(rank) for rank in waiting}
            waiting = [rank for rank, state in states.items() if state is None or not ready(state)]
            for rank in waiting:
                state = states[rank]
                if state is not None and state.left:
                    raise self._lost(rank, state, "a process that left")
            if not waiting:
                return
            time.sleep(pause)
            pause = min(1.5 * pause, LONGEST_POLL)

    def _check_rank(self, rank: int) -> _State | None:
        """Return the state of a rank, None if unknown. Raise DataError if it failed or is lost."""
        now = time.monotonic()
        state = self._read(rank)
        last, since = self._seen.get(rank, (None, now))
        if state is not None and (last is None or state.beat != last.beat):
            since = now
        state = state or last
        if state is None:
            return None
        self._seen[rank] = (state, since)
        if state.failed is not None:
            error = DataError(Problem(**problem) for problem in state.failed)
            error.everywhere = state.everywhere
            raise error
        if state.left:
            return state
        if state.is_gone or now - since > self._seconds:
            what = "a process that ended" if state.is_gone else f"no heartbeat for {self._seconds:g} s"
            raise self._lost(rank, state, what)
        return state

    def _lost(self, rank: int, state: _State, what: str) -> LostPeerError:
        remedy = "see its messages, then run the same command again: finished work is kept"
        got = f"{what} before its work was done"
        return LostPeerError(Problem(f"rank {rank} on {state.host}", got, remedy=remedy))


def _pid_namespace() -> str:
    try:
        boot = Path("/proc/sys/kernel/random/boot_id").read_text().strip()
        return f"{boot} {os.readlink('/proc/self/ns/pid')}"
    except OSError:
        return ""
