"""One job under a storm: two hosts with a launcher each, a web server of the corpus, a small disk for the run
folder, and clocks that can be set off.

The launchers are what launch/torchrun.sh runs, and start warm, as their ranks do (see tests/support/warm.py).
A scheduler starts a launcher again that has ended before the job is done.
"""

from __future__ import annotations

import json
import mmap
import os
import signal
import struct
import subprocess
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path

import psutil

from llmtrain.track.events import EVENTS, read_events
from tests.support.kernel import FOLDER, VARIABLE
from tests.support.listening import STEERING
from tests.support.servers import FileServer
from tests.support.storm.layouts import SPOILS, STREAMED, Layout
from tests.support.two_hosts import Hosts, two_hosts
from tests.support.warm import PRELUDE, TORCHRUN, Popen

DISK_BYTES = 24 << 20
PAUSE_SECONDS = 0.05
"""Before each step, so that a fault meets few steps, as in a real job."""
TRACEBACK = "Traceback (most recent call last)"
SCHEDULER_SECONDS = 1.0
"""After which a launcher that has ended is started again."""
CLOCK = """
import mmap, struct, time

with open({knobs!r}, "rb") as file:
    knobs = mmap.mmap(file.fileno(), 16, access=mmap.ACCESS_READ)
of_machine = time.time

def of_host():
    return of_machine() + struct.unpack_from("d", knobs)[0]

time.time = of_host
time.time_ns = lambda: int(of_host() * 1e9)
"""
"""A prelude: the time of day is off by the seconds in a file, for Python's callers of this process."""
PAUSE = 'struct.unpack_from("d", knobs, 8)[0]'


@dataclass
class Place:
    """One of the two hosts."""

    number: int
    knobs: mmap.mmap
    environment: dict[str, str]
    log: Path
    launcher: Popen | None = None
    ended_at: float | None = None
    starts: int = 0
    codes: list[int] = field(default_factory=list)
    """Exit codes of its launchers that ended."""

    def set_clock(self, seconds: float) -> None:
        """Set its clock off by so many seconds."""
        struct.pack_into("d", self.knobs, 0, seconds)

    @property
    def family(self) -> list[psutil.Process]:
        """Its launcher and what that has started."""
        assert self.launcher is not None
        with suppress(psutil.NoSuchProcess):
            own = psutil.Process(self.launcher.pid)
            return [*own.children(recursive=True), own]
        return []


class Job:
    """A job that runs; `tend` must be called often."""

    def __init__(
        self, words: list[str], run: Path, places: list[Place], hosts: Hosts, server: FileServer
    ) -> None:
        self._words, self.run, self.places, self.hosts, self.server = words, run, places, hosts, server
        self._processes: set[psutil.Process] = set()
        self._looked = 0.0
        self.meanwhile: Callable[[], None] = lambda: None
        """What a fault does again and again."""
        self.scheduler_starts = 0
        """How often the scheduler has started a launcher again."""

    @property
    def disk(self) -> Path:
        return self.run.parent

    def start(self, place: Place) -> None:
        """Start the launcher of a host."""
        place.starts += 1
        place.ended_at = None
        with place.log.open("ab") as log:
            place.launcher = Popen(
                self._words, TORCHRUN, cwd="/", env=place.environment, stdout=log, stderr=subprocess.STDOUT
            )

    def tend(self) -> None:
        """As a scheduler, start launchers again that have ended."""
        if time.monotonic() - self._looked > 1:
            self._looked = time.monotonic()
            self._processes.update(process for place in self.places for process in place.family)
        self.meanwhile()
        for place in self.places:
            assert place.launcher is not None
            code = place.launcher.poll()
            if code is None:
                continue
            if place.ended_at is None:
                place.ended_at = time.monotonic()
                place.codes.append(code)
            others = [other for other in self.places if other is not place]
            done = code == 0 and all(other.launcher.poll() in (None, 0) for other in others)  # type: ignore[union-attr]
            if not done and time.monotonic() - place.ended_at > SCHEDULER_SECONDS:
                self.scheduler_starts += 1
                self.start(place)

    @property
    def is_done(self) -> bool:
        """Whether all launchers have ended well."""
        return all(place.launcher is not None and place.launcher.poll() == 0 for place in self.places)

    def wait(self, is_true: Callable[[], object], seconds: float) -> bool:
        """Wait, as the scheduler; → whether it has become true."""
        deadline = time.monotonic() + seconds
        while not is_true():
            self.tend()
            if time.monotonic() > deadline:
                return False
            time.sleep(0.05)
        return True

    def rest(self, seconds: float) -> None:
        self.wait(lambda: False, seconds)

    def set_pause(self, seconds: float) -> None:
        """Set how long each rank waits before a step."""
        for place in self.places:
            struct.pack_into("d", place.knobs, 8, seconds)

    def rank(self, number: int) -> psutil.Process | None:
        """The process of a rank; None while there is none."""
        for place in self.places:
            for process in place.family:
                with suppress(psutil.Error):
                    if process.name() == f"rank {number}":
                        return process
        return None

    # What is known of its way

    @property
    def starts(self) -> list[int]:
        """The step of each start so far, without those by which a run goes back in the same processes."""
        events = [event for event in read_events(self.run / EVENTS) if event.kind in ("start", "rollback")]
        return [
            event.step or 0
            for before, event in zip([None, *events], events, strict=False)
            if event.kind == "start" and (before is None or before.kind == "start")
        ]

    @property
    def step(self) -> int:
        """The last step in the metrics."""
        try:
            with (self.run / "metrics.jsonl").open("rb") as file:
                file.seek(max(0, os.fstat(file.fileno()).st_size - 4096))
                lines = file.read().splitlines()
        except OSError:
            return 0
        for line in reversed(lines):
            if line.endswith(b"}"):
                with suppress(ValueError):
                    return int(json.loads(line)["step"])
        return 0

    def said(self) -> list[int]:
        """How much has been said so far; for `said_since`."""
        events = len(read_events(self.run / EVENTS))
        return [events, *(place.log.stat().st_size if place.log.exists() else 0 for place in self.places)]

    def said_since(self, before: list[int]) -> str:
        """What the launchers, and rank 0 by one of them, have said, and why restarts were made."""
        events = read_events(self.run / EVENTS)[before[0] :]
        parts = [str(event.facts.get("why", "")) for event in events]
        for place, start in zip(self.places, before[1:], strict=True):
            with place.log.open("rb") as file:
                file.seek(start)
                parts.append(file.read().decode(errors="replace"))
        return "\n".join(parts)

    def traceback(self) -> str:
        """The log of a rank that has one; "" if none has."""
        logs = (self.run / "logs").glob("rank*.log")
        return next((log.name for log in logs if TRACEBACK in log.read_text(errors="replace")), "")

    def kill(self) -> None:
        """End everything of this job."""
        for place in self.places:
            if place.launcher is not None:
                self._processes.update(place.family)
        for process in self._processes:
            with suppress(psutil.Error):  # by its number and the time of its start
                if process.is_running():
                    process.send_signal(signal.SIGKILL)
        for place in self.places:
            if place.launcher is not None:
                place.launcher.wait()


@contextmanager
def small_disk(folder: Path) -> Iterator[Path]:
    """A disk of DISK_BYTES."""
    folder.mkdir(parents=True)
    subprocess.run(["mount", "-t", "tmpfs", "-o", f"size={DISK_BYTES}", "tmpfs", folder], check=True)
    try:
        yield folder
    finally:
        subprocess.run(["umount", "-l", folder], check=True)


@contextmanager
def started(
    folder: Path, tag: str, layout: Layout, corpus: Path, nan_samples: list[int], *, is_numbered: bool
) -> Iterator[Job]:
    """A job that has begun; everything of it has ended when the block has.

    is_numbered: hosts have a NODE_RANK; else they number themselves. Raises NoNamespacesError.
    """
    with ExitStack() as stack:
        # Before the hosts, which have mounts of their own from then on.
        disk = stack.enter_context(small_disk(folder / "disk"))
        hosts = stack.enter_context(two_hosts(tag))
        served = hosts.on(0, lambda: FileServer(corpus.parent, address=hosts.address))
        server = stack.enter_context(served)
        run = disk / "run"
        words = [*layout.settings, *STREAMED, f"data.path={server.url}/{corpus.name}", f"run.dir={run}"]
        words.append(f"data.cache.dir={folder / 'cache'}")
        places = [_place(folder, hosts, number, nan_samples) for number in range(2)]
        meeting = {"NNODES": "2", "NPROC_PER_NODE": str(layout.ranks), "MAX_RESTARTS": "100"}
        for place in places:
            place.environment |= meeting
            if is_numbered:
                numbered = {"MASTER_ADDR": hosts.address, "MASTER_PORT": "29610"}
                place.environment |= {**numbered, "NODE_RANK": str(place.number)}
            else:
                place.environment["RDZV_ENDPOINT"] = f"{hosts.address}:29610"
        job = Job(words, run, places, hosts, server)
        stack.callback(job.kill)
        job.set_pause(PAUSE_SECONDS)
        for place in places:
            job.start(place)
        yield job


def _place(folder: Path, hosts: Hosts, number: int, nan_samples: list[int]) -> Place:
    knobs = folder / f"knobs{number}"
    knobs.write_bytes(bytes(16))
    with knobs.open("r+b") as file:
        mapped = mmap.mmap(file.fileno(), 16)
    prelude = folder / f"host{number}.py"
    of_ranks = SPOILS.format(samples=nan_samples, pause=PAUSE)
    indented = "\n".join(f"    {line}" for line in of_ranks.splitlines())
    own = CLOCK.format(knobs=str(knobs))
    entering = Path(hosts.entering[number][PRELUDE]).read_text()
    prelude.write_text(f"{entering}{own}\nif 'RANK' in os.environ:\n{indented}\n")
    clean = {name: value for name, value in os.environ.items() if name not in STEERING}
    environment = {**clean, "OMP_NUM_THREADS": "1", VARIABLE: os.environ.get(VARIABLE, FOLDER)}
    environment |= {PRELUDE: str(prelude), "START_TIMEOUT": "120"}
    return Place(number, mapped, environment, folder / f"host{number}.log")
