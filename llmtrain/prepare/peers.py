"""The processes of one job, on one host or many, that prepare a corpus together in a shared folder.

They meet through files in OUTPUT/.prepare/peers alone: no port, no process group. `job.json` names the
job and, once all are there, its members; each process keeps a file of its own, in which it says how far
it is and, every HEARTBEAT_SECONDS, that it lives. Who waits for a process whose file stands still for too
long, or says that it failed, ends with an error that names it. Times are compared with the reader's own
clock, so the hosts' clocks need not agree.
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
SHORTEST_LOOK, LONGEST_LOOK = 0.01, 1.0
"""Seconds between two looks at the others' files, growing while nothing happens."""
FOLDER = "peers"

T = TypeVar("T")


class LostPeerError(DataError):
    """Another process of the job is gone."""


@dataclass(frozen=True)
class _State:
    """What a process says in its file."""

    nonce: str
    host: str
    pid: int
    place: str
    """Equal in processes that see each other's pid."""
    beat: int = 0
    stage: int = 0
    """How many times it came to `wait`."""
    said: str = ""
    """Its word there."""
    said_before: str = ""
    """Its word the time before: who looks late finds it one stage ahead."""
    left: bool = False
    """It writes no more."""
    failed: list[dict[str, str]] | None = None
    everywhere: bool | None = None
    """Of the failure: whether rank 0 tells it for all."""

    @property
    def is_gone(self) -> bool:
        """Whether this very process looked and saw that there is no such process any more."""
        if not self.place or self.place != _place():
            return False
        try:
            return psutil.Process(self.pid).status() == psutil.STATUS_ZOMBIE
        except psutil.NoSuchProcess:
            return True


class Peers:
    """This process among `size` of one job; with one, nothing is written and nobody is waited for.

    job: the same in all processes of a job, as the launcher names it.
    seconds: how long a process waits for a sign of life of another.
    """

    def __init__(self, work: Path, rank: int = 0, size: int = 1, job: str = "", seconds: float = 600) -> None:
        self.rank, self.size = rank, size
        self._folder = work / FOLDER
        self._job, self._seconds = job, seconds
        self._id = ""
        self._state = _State(secrets.token_hex(8), socket.gethostname(), os.getpid(), _place())
        self._seen: dict[int, tuple[_State, float]] = {}
        self._looked = 0.0
        self._lock = threading.Lock()
        self._ended = threading.Event()
        self._heart: threading.Thread | None = None

    def mine(self, number: int) -> bool:
        """Whether the piece of work of this number is this process' to do."""
        return number % self.size == self.rank

    def meet(self) -> None:
        """Come together: rank 0 calls the job, the others answer until it has them all.

        Raise DataError if somebody does not come.
        """
        if self.size == 1:
            return
        if self.rank == 0:
            self._call()
        else:
            self._answer()
        self._heart = threading.Thread(target=self._beat, daemon=True)
        self._heart.start()

    def wait(self, say: str = "") -> str:
        """Wait until all have come here, and tell rank 0's word, given by it as `say`, to all.

        Raise DataError for a process that failed or is gone.
        """
        if self.size == 1:
            return say
        stage = self._state.stage + 1
        self._write(stage=stage, said=say, said_before=self._state.said)
        self._await(lambda state: state.stage >= stage)
        leader = self._state if self.rank == 0 else self._seen[0][0]
        # It cannot be two stages ahead: it waits for this process at the next.
        return leader.said if leader.stage == stage else leader.said_before

    def check(self) -> None:
        """Raise DataError if another process is known to have failed or died; looks now and then only."""
        if self.size > 1 and time.monotonic() - self._looked > HEARTBEAT_SECONDS:
            self._looked = time.monotonic()
            for rank in self._others():
                self._look(rank)

    def visible(self, find: Callable[[int], T | None], numbers: Iterable[int]) -> Iterator[T]:
        """find(number) of each number, once this host sees the file that another host has written.

        Raise DataError if it does not see it in time.
        """
        for number in numbers:
            deadline, pause = time.monotonic() + self._seconds, SHORTEST_LOOK
            while (found := find(number)) is None:
                if self.mine(number) or time.monotonic() > deadline:
                    owner = number % self.size
                    host = self._state.host if self.mine(number) else self._seen[owner][0].host
                    got = f"finished work of rank {owner} on {host} that {self._state.host} does not see"
                    remedy = "let all hosts see one output folder, then run the same command again"
                    raise DataError(Problem(str(self._folder.parent), got, remedy=remedy))
                time.sleep(pause)
                pause = min(2 * pause, LONGEST_LOOK)
            yield found

    def leave(self, failure: UserError | None = None) -> None:
        """Write no more; with `failure`, let the others end for it."""
        if self.size == 1 or not self._id:
            return
        self._ended.set()
        if self._heart is not None:
            self._heart.join()
        failed = None
        if failure is not None:
            failed = [asdict(problem) for problem in failure.problems]
            failure.everywhere = None if isinstance(failure, LostPeerError) else True
        # The folder is gone once rank 0 is done with it.
        with suppress(OSError):
            self._write(left=True, failed=failed, everywhere=failure and failure.everywhere)

    def await_end(self) -> None:
        """After `leave`: wait for rank 0 to say that the corpus is whole; for rank 0: for all to have left.

        Raise DataError if rank 0 failed or is gone.
        """
        if self.size == 1:
            return
        if self.rank == 0:
            for rank in self._others():
                # Who is dead by now had done its work.
                with suppress(DataError):
                    self._await(lambda state: state.left, ranks=[rank])
            return
        self._seen.clear()
        self._await(lambda state: state.left, ranks=[0], until=lambda: self._called() is None)

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

    def _called(self) -> dict[str, Any] | None:
        try:
            return json.loads((self._folder / "job.json").read_text())
        except (OSError, ValueError):
            return None

    def _beat(self) -> None:
        while not self._ended.wait(HEARTBEAT_SECONDS):
            # A disk that is full for a moment is no reason to die: the work itself will tell.
            with suppress(OSError):
                self._write()

    def _others(self) -> list[int]:
        return [rank for rank in range(self.size) if rank != self.rank]

    # ------------------------------------------------------------------------------------- meeting

    def _call(self) -> None:
        self._folder.mkdir(exist_ok=True)
        self._id = secrets.token_hex(8)
        for leftover in self._folder.glob("*.json"):
            leftover.unlink(missing_ok=True)
        call = {"job": self._job, "id": self._id, "size": self.size, "members": None}
        write_marker(self._folder / "job.json", call)
        self._write()
        present = lambda: {rank: state for rank in self._others() if (state := self._read(rank))}  # noqa: E731
        for _ in self._looks():
            if len(here := present()) == self.size - 1:
                break
        else:
            missing = [str(rank) for rank in self._others() if rank not in here]
            raise self._absent(f"rank{'s' if len(missing) > 1 else ''} {', '.join(missing)} of {self.size}")
        call["members"] = [here[rank].nonce if rank else self._state.nonce for rank in range(self.size)]
        write_marker(self._folder / "job.json", call)

    def _answer(self) -> None:
        for _ in self._looks():
            call = self._called()
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
        got = f"no word from {who} within {self._seconds:g} s"
        remedy = "start all processes with one output folder that all hosts see"
        return DataError(Problem(str(self._folder.parent.parent), got, remedy=remedy))

    def _looks(self) -> Iterator[None]:
        """Now and then, until the time is over."""
        deadline, pause = time.monotonic() + self._seconds, SHORTEST_LOOK
        while time.monotonic() < deadline:
            yield
            time.sleep(pause)
            pause = min(1.5 * pause, LONGEST_LOOK)

    # ------------------------------------------------------------------------------------- waiting

    def _await(
        self,
        ready: Callable[[_State], bool],
        ranks: Iterable[int] | None = None,
        until: Callable[[], bool] = lambda: False,
    ) -> None:
        now = time.monotonic()
        self._seen = {rank: (state, now) for rank, (state, _) in self._seen.items()}
        waiting, pause = list(self._others() if ranks is None else ranks), SHORTEST_LOOK
        while not until():
            states = {rank: self._look(rank) for rank in waiting}
            waiting = [rank for rank, state in states.items() if state is None or not ready(state)]
            for rank in waiting:
                state = states[rank]
                if state is not None and state.left:
                    raise self._lost(rank, state, "a process that left")
            if not waiting:
                return
            time.sleep(pause)
            pause = min(1.5 * pause, LONGEST_LOOK)

    def _look(self, rank: int) -> _State | None:
        """What the process of that rank says now. Raise DataError if it failed or is gone."""
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
            what = "a process that ended" if state.is_gone else f"no sign of life for {self._seconds:g} s"
            raise self._lost(rank, state, what)
        return state

    def _lost(self, rank: int, state: _State, what: str) -> LostPeerError:
        remedy = "see what it said, then run the same command again: finished work is kept"
        got = f"{what} before its work was done"
        return LostPeerError(Problem(f"rank {rank} on {state.host}", got, remedy=remedy))


def _place() -> str:
    try:
        boot = Path("/proc/sys/kernel/random/boot_id").read_text().strip()
        return f"{boot} {os.readlink('/proc/self/ns/pid')}"
    except OSError:
        return ""
