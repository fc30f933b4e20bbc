"""Open and close the watch of a run; the interface that the rest of llmtrain uses."""

from __future__ import annotations

import os
import secrets
import socket
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path

import torch
import torch.distributed as dist

from llmtrain.distributed import processes
from llmtrain.errors import TrainingError
from llmtrain.files import disk_problem, expand_home
from llmtrain.track.events import note_event
from llmtrain.watch import calls, recorder
from llmtrain.watch.board import Board
from llmtrain.watch.clock import CudaClock, WallClock
from llmtrain.watch.comparing import Comparing
from llmtrain.watch.config import DebugConfig, WatchConfig
from llmtrain.watch.neighbours import Folder, memory
from llmtrain.watch.recorder import Recorder
from llmtrain.watch.stragglers import Slow, Stragglers
from llmtrain.watch.watcher import Places, Watcher

STORE_SECONDS = 5.0
"""Timeout of the watch's own requests to the store."""

WITHOUT = "watch.hang_seconds=0 watch.stragglers=false debug.collectives=false"
"""The setting that switches the watch off."""

_current: Watch | None = None


class Watch:
    """The watch of one start of a run, in one process."""

    def __init__(
        self,
        config: WatchConfig,
        debug: DebugConfig,
        run: Path,
        device: torch.device,
        peers: Sequence[Sequence[int]],
    ) -> None:
        """Start watching. All ranks call it together. Raise TrainingError on all of them if the memory of a
        host has no room for the files.

        run: the run folder; peers: groups of ranks that do the same work.
        """
        self._run = run
        self.say: Callable[[str], None] = lambda text: None
        """Prints a line of rank 0, once there is somewhere to print it."""
        name = socket.gethostname()
        gathered = processes.gather((name, _host_key()))
        token = processes.from_main(secrets.token_hex(8))
        by_host: dict[tuple[str, str], list[int]] = {}
        for rank, host in enumerate(gathered):
            by_host.setdefault(host, []).append(rank)
        own = processes.rank()
        number = list(by_host).index(gathered[own])
        self._hosts = [host for host, _ in gathered]
        clock = None
        if config.stragglers:
            clock = CudaClock() if device.type == "cuda" else WallClock()
        compares = debug.collectives and processes.world_size() > 1

        def open_files() -> tuple[Folder, Recorder]:
            folder = None
            try:
                folder = Folder(f"{token}-{number}", name, own, by_host[gathered[own]])
                return folder, Recorder(folder.file_of(own), own, with_ring=compares, clock=clock)
            except OSError as error:
                if folder is not None:
                    folder.close()
                remedy = f"make room there, or train without: {WITHOUT}"
                raise TrainingError(disk_problem(error, memory(), if_full=remedy)) from error

        self._folder, self._recorder = processes.agree(open_files)
        self._folder.open_traces()
        self.stragglers: Stragglers | None = None
        if clock is not None:
            self.stragglers = Stragglers(config, clock, peers, device, self._on_slow)
        board = None
        if len(by_host) > 1:
            board = Board(_connect, f"watch/{token}", number, len(by_host))
        logs = os.environ.get("LOG_DIR")
        places = Places(
            run,
            expand_home(logs) if logs else run / "logs",
            [(host, tuple(ranks)) for (host, _), ranks in by_host.items()],
        )
        comparing = Comparing(self._folder) if compares else None
        self.watcher = Watcher(config, places, self._recorder, self._folder, board, comparing)
        if dist.is_initialized():
            calls.install()
        recorder.current = self._recorder
        self.watcher.start()

    def close(self, failed: bool) -> None:
        """Stop watching. After a failure of one of several ranks it goes on for a while: see Watcher.stop."""
        self.watcher.stop(failed)
        if failed and processes.world_size() > 1:
            return
        recorder.current = None
        self._recorder.close()
        self._folder.close()

    def _on_slow(self, slow: Slow) -> None:
        if not processes.is_main():
            return
        who = f"rank {slow.rank} on {self._hosts[slow.rank]}"
        step = self._recorder.step
        if slow.is_slow:
            times = f"{slow.phase} {slow.seconds:.3f} s a step, median {slow.median:.3f} s"
            self.say(f"warning: {who} is slow: its work takes {slow.factor:.1f} times the median; {times}")
        else:
            self.say(f"{who} keeps up again")
        facts = {"rank": slow.rank, "host": self._hosts[slow.rank], "is_slow": slow.is_slow}
        note_event(self._run, "straggler", step, **facts, factor=round(slow.factor, 2), phase=slow.phase)


@contextmanager
def watched(
    config: WatchConfig,
    debug: DebugConfig,
    run: Path,
    device: torch.device,
    peers: Sequence[Sequence[int]],
) -> Iterator[None]:
    """Watch over what is done inside. All ranks enter it together; see Watch."""
    global _current
    if not (config.hang_seconds or config.stragglers or debug.collectives):
        yield
        return
    _current = Watch(config, debug, run, device, peers)
    is_failed = True
    try:
        yield
        is_failed = False
    finally:
        watch = _current
        _current = None if processes.world_size() == 1 or not is_failed else watch
        watch.close(is_failed)


def say_by(say: Callable[[str], None]) -> None:
    """Have the watch print lines of rank 0 by `say`."""
    if _current is not None:
        _current.say = say


def after_step() -> None:
    """Gather times of phases, if it is time to. All ranks call it after each step."""
    if _current is not None and _current.stragglers is not None:
        _current.stragglers.after_step()


def times() -> dict[str, float]:
    """Return metrics of the times of phases, where new ones are known."""
    if _current is None or _current.stragglers is None:
        return {}
    return _current.stragglers.take_metrics()


def suspect() -> str | None:
    """Return which rank is behind, after a connection to another rank failed; None if nothing is known."""
    if _current is not None:
        with suppress(OSError):
            return _current.watcher.suspect()
    return None


def _connect() -> dist.Store:
    return processes.connect_to_store(STORE_SECONDS)


def _host_key() -> str:
    """Return what processes share that can read each other's files and see each other in /proc."""
    parts = [str(os.getuid())]
    with suppress(OSError):
        parts.append(Path("/proc/sys/kernel/random/boot_id").read_text().strip())
    for kind in ("pid", "mnt", "net"):
        with suppress(OSError):
            parts.append(os.readlink(f"/proc/self/ns/{kind}"))
    return " ".join(parts)
