"""The faults of a storm: what each does to a job, and which words name it."""

from __future__ import annotations

import random
import re
import signal
from contextlib import suppress
from dataclasses import dataclass
from typing import ClassVar

import psutil

from tests.support.storm.job import Job
from tests.support.storm.layouts import Layout

CUT = r"gave no sign of life|got no progress|gave no answer|no answer from|got no answer|has not answered"
GONE = r"gave no sign of life|no answer from host 0|a launcher \(process \d+, \w+\) that has ended"


@dataclass(frozen=True)
class Fault:
    """One fault at a random moment."""

    gap: int
    """Steps after which it comes, once the job has gone on from the fault before."""
    delay: float
    """Seconds after that step."""
    target: int
    """The rank or host that it is done to."""
    seconds: float
    """How long it lasts, where it is undone."""

    kind: ClassVar[str]
    share: ClassVar[int]
    """How many of a hundred faults are of this kind."""
    longest: ClassVar[float] = 0.0
    takes_launcher: ClassVar[bool] = False
    """A launcher may end by it, which the scheduler starts again."""
    restarts: ClassVar[bool | None] = None
    """Whether the job must restart, or must not; None: it may."""

    names: ClassVar[str] = "$^"
    """The pattern of the words that name the cause, where the job restarts or ends; {target} is the rank."""

    def strike(self, job: Job) -> None:
        """Do it to a job that runs."""
        raise NotImplementedError

    def lift(self, job: Job) -> None:
        """Undo it after `seconds`."""


def _kill(processes: list[psutil.Process]) -> None:
    """All at once."""
    for number in (signal.SIGSTOP, signal.SIGKILL):
        for process in processes:
            with suppress(psutil.NoSuchProcess):
                process.send_signal(number)


def _signal_rank(job: Job, rank: int, number: signal.Signals) -> None:
    job.wait(lambda: job.rank(rank), 30.0)
    process = job.rank(rank)
    assert process is not None, f"there is no rank {rank}"
    process.send_signal(number)


class RankKilled(Fault):
    kind, share, restarts = "kill -9 of a rank", 15, True
    names = r"rank \d+ exited with 137 \(killed by SIGKILL"

    def strike(self, job: Job) -> None:
        _signal_rank(job, self.target, signal.SIGKILL)


class AgentKilled(Fault):
    kind, share, takes_launcher, restarts, names = "kill -9 of a launcher", 12, True, True, GONE

    def strike(self, job: Job) -> None:
        launcher = job.places[self.target % 2].launcher
        assert launcher is not None
        launcher.kill()


class HostKilled(Fault):
    kind, share, takes_launcher, restarts, names = "a host loses its power", 10, True, True, GONE

    def strike(self, job: Job) -> None:
        _kill(job.places[self.target % 2].family)


class RankStopped(Fault):
    kind, share, longest = "SIGSTOP of a rank, then SIGCONT", 10, 3.0
    names = r"got no progress"  # on a machine that is busy three seconds may be six

    def strike(self, job: Job) -> None:
        _signal_rank(job, self.target, signal.SIGSTOP)

    def lift(self, job: Job) -> None:
        process = job.rank(self.target)
        if process is not None:
            process.send_signal(signal.SIGCONT)


class RankStoppedForGood(Fault):
    kind, share, restarts = "SIGSTOP of a rank for good", 10, True
    names = r"rank {target} on \S+: got no progress for .*(stopped by a signal|gives no sign of life)"

    def strike(self, job: Job) -> None:
        _signal_rank(job, self.target, signal.SIGSTOP)


class NetworkCut(Fault):
    kind, share, longest, takes_launcher, names = "the network cut for 1 to 4 s", 8, 4.0, True, CUT

    def strike(self, job: Job) -> None:
        job.hosts.plug(self.target % 2, "down")

    def lift(self, job: Job) -> None:
        job.hosts.plug(self.target % 2, "up")


class NetworkCutLong(NetworkCut):
    kind, share, longest = "the network cut for 10 to 40 s", 4, 40.0


class DiskFull(Fault):
    kind, share, longest = "the disk full for 1 to 5 s", 9, 5.0
    names = r"a full disk|No space left on device"

    def strike(self, job: Job) -> None:
        """Fill it again and again: the run deletes old checkpoints meanwhile."""

        def fill() -> None:
            with suppress(OSError), (job.disk / "filling").open("ab", buffering=0) as file:
                for size in (1 << 20, 1 << 12):
                    with suppress(OSError):
                        while True:
                            file.write(bytes(size))

        job.meanwhile = fill

    def lift(self, job: Job) -> None:
        job.meanwhile = lambda: None
        (job.disk / "filling").unlink()


class ServerFails(Fault):
    kind, share, longest = "the server of the corpus fails for 1 to 8 s", 9, 8.0
    names = r"http://\S+: got no answer that can be used in \d attempts"

    def strike(self, job: Job) -> None:
        job.server.faults.unavailable = 1 << 30

    def lift(self, job: Job) -> None:
        job.server.faults.unavailable = 0


class ClockOff(Fault):
    kind, share, longest, restarts = "the clock of a host set off by up to two days", 8, 4.0, False

    def strike(self, job: Job) -> None:
        job.places[self.target % 2].set_clock(random.Random(repr(self)).uniform(-172_800, 172_800))

    def lift(self, job: Job) -> None:
        job.places[self.target % 2].set_clock(0.0)


KINDS: tuple[type[Fault], ...] = (
    *(RankKilled, AgentKilled, HostKilled, RankStopped, RankStoppedForGood, NetworkCut, NetworkCutLong),
    *(DiskFull, ServerFails, ClockOff),
)
NAN = "NaN in the gradients of a replica"
"""A kind of its own: it is part of what is trained, also of the undisturbed run."""


def plan(
    source: random.Random, layout: Layout, count: int, kinds: tuple[type[Fault], ...] = KINDS
) -> list[Fault]:
    """So many faults, one after the other."""

    def draw(kind: type[Fault]) -> Fault:
        shortest = 10.0 if kind is NetworkCutLong else min(1.0, kind.longest)
        return kind(
            gap=source.randint(3, 20),
            delay=source.uniform(0.0, 0.3),
            target=source.randrange(2 * layout.ranks),
            seconds=source.uniform(shortest, kind.longest),
        )

    return [draw(kind) for kind in source.choices(kinds, [kind.share for kind in kinds], k=count)]


def is_named(fault: Fault, said: str) -> str:
    """The line that names the cause; "" if there is none."""
    names = fault.names.replace("{target}", str(fault.target))
    found = re.search(f"^.*(?:{names}).*$", said, re.MULTILINE)
    return "" if found is None else found[0].strip()
