"""Copies of the state in the memory of the hosts, between checkpoints: if a host is lost, another has its
part.

    FOLDER/step-00000030/      in the folder that the launcher of a host made (distributed/memory_folder.py)
      rank-00000.safetensors   of the ranks of this host, and of those of the host before it in the ring
      manifest.json            that of the whole checkpoint, on each host

A copy has the format of a checkpoint (store.py), and fits any layout. Each host's ranks write their shares to
its own memory; then a thread of its first rank gets those of the host before it. The copy before is kept
until all hosts have done so. Ranks that are started anew go on from the newest copy of which the hosts that
are left hold every file, and get those that they lack when they read them.
"""

from __future__ import annotations

import fcntl
import os
import platform
import secrets
import shutil
import threading
import time
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

from llmtrain import files
from llmtrain.checkpoint import memory_transfer, store
from llmtrain.checkpoint.config import MemoryConfig
from llmtrain.checkpoint.manifest import MANIFEST, read_manifest, step_folder
from llmtrain.checkpoint.memory_choice import Choice, Held, choose, holders_of
from llmtrain.checkpoint.reader import Checkpoint
from llmtrain.checkpoint.retention import list_steps
from llmtrain.checkpoint.saver import Saver
from llmtrain.distributed import processes
from llmtrain.distributed.memory_folder import MEMORY
from llmtrain.engine.base import Engine
from llmtrain.errors import CheckpointError, TrainingError
from llmtrain.standard_streams import Say

PATIENCE_SECONDS = 120.0
"""How long a host waits for the files of its neighbour."""
RETRY_SECONDS = 0.2
STOP_SECONDS = 5.0


class LostCopyError(torch.distributed.DistNetworkError):
    """A file of a copy in memory could not be read when it was needed. No mistake of a user: started anew,
    ranks go on from another copy, or from the disk."""


class MemoryTier:
    """The copies in memory of a run; none are made without a launcher that restarts ranks. All ranks call its
    methods alike."""

    def __init__(self, config: MemoryConfig, say: Say) -> None:
        self._say = say
        self._every = config.every
        self._folder = Path(os.environ.get(MEMORY, os.devnull))
        self.is_on = config.every is not None and MEMORY in os.environ
        self._leads = False
        """Whether this rank is the first one of its host, which alone deletes and gets files there."""
        self.left_out: Collection[str] = ()
        """Names of the frozen weights that copies leave out, as Saver.left_out."""
        self._saver: Saver | None = None
        self._server: memory_transfer.Server | None = None
        self._neighbour: _Neighbour | None = None
        self._last: int | None = None
        """The step of the newest copy."""
        self._whole: int | None = None
        """The step of the newest copy that all hosts and their neighbours hold."""
        self._has_warned = False

    def open(self) -> None:
        """Find the other hosts, and serve them what this one holds."""
        if not self.is_on:
            if self._every is not None:
                why = "no launcher restarts ranks (launch/torchrun.sh with MAX_RESTARTS)"
                self._say(f"warning: checkpoint.memory.every={self._every}: no copies are made, as {why}")
            return
        places = processes.gather((platform.node(), str(self._folder)))
        hosts = list(dict.fromkeys(places))
        self._host = hosts.index(places[processes.rank()])
        self._ranks = [[rank for rank, place in enumerate(places) if place == host] for host in hosts]
        self._leads = processes.rank() == self._ranks[self._host][0]
        self._secret = processes.from_main(secrets.token_bytes(32))
        if self._leads and len(hosts) > 1:
            self._server = memory_transfer.Server(processes.own_address(), self._secret, self._folder)
        address = None if self._server is None else self._server.address
        gathered = processes.gather(address)
        # A single host has no server, and asks none.
        self._addresses = [gathered[ranks[0]] or ("", 0) for ranks in self._ranks]
        self._saver = Saver(self._folder, makes_folders=self._leads)
        if self._leads:
            store.tidy(self._folder)

    # Going on from a copy

    def newest(self, at_least: int) -> Checkpoint | None:
        """Return the newest good copy of a step of `at_least` or later, the same on every rank; None if there
        is none. Copies of later steps are deleted: the run comes to those steps once more."""
        if self._saver is None:
            return None
        held = self._gather_held()
        choice, passed_over = choose(held, at_least)
        while choice is not None and (damaged := self._damaged_files(choice.step)):
            for host, name, flaw in damaged:
                self._say(f"damaged copy in memory: step {choice.step:,}, {name} of host {host}: {flaw}")
                found = held[host][choice.step]
                held[host][choice.step] = replace(found, files=found.files - {name})
            choice, passed_over = choose(held, at_least)
        for step, reason in passed_over:
            self._say(f"copy in memory of step {step:,} passed over: {reason}")
        self._delete(lambda step: step > (at_least if choice is None else choice.step))
        if choice is None:
            return None
        self._last = self._whole = choice.step
        path = self._folder / step_folder(choice.step)
        self._get_manifest(choice, path)
        processes.barrier()
        checkpoint = Checkpoint.open(path)

        def fetch(wanted: Path) -> None:
            self._fetch(wanted, choice, held, checkpoint.manifest)

        return Checkpoint(path, checkpoint.manifest, fetch=fetch)

    def _gather_held(self) -> list[dict[int, Held]]:
        """Return, of each host, what it holds of the copy of each step."""
        own: dict[int, Held] = {}
        flaws: list[str] = []
        for path in list_steps(self._folder) if self._leads else ():
            try:
                manifest = read_manifest(path)
            except CheckpointError as error:
                shutil.rmtree(path, ignore_errors=True)
                flaws.append(f"host {self._host}: {error}")
                continue
            sizes = {entry["file"]: entry["bytes"] for entry in manifest["files"]}
            there = {entry.name: entry.stat().st_size for entry in path.iterdir()}
            whole = frozenset(name for name, size in sizes.items() if there.get(name) == size)
            own[manifest["step"]] = Held(manifest["checksum"], len(sizes), whole)
        gathered = processes.gather((own, flaws))
        for flaw in (flaw for _, of_rank in gathered for flaw in of_rank):
            self._say(f"damaged copy in memory: {flaw}")
        return [dict(gathered[ranks[0]][0]) for ranks in self._ranks]

    def _damaged_files(self, step: int) -> list[tuple[int, str, str]]:
        """Compare the checksums of all files of a copy, wherever they are; ranks of a host share them.
        Delete those that are damaged, and return host, name and flaw of each."""
        path = self._folder / step_folder(step)
        found: list[tuple[int, str, str]] = []
        if (path / MANIFEST).exists():
            here = [e for e in read_manifest(path)["files"] if (path / e["file"]).exists()]
            own = self._ranks[self._host]
            for entry in here[own.index(processes.rank()) :: len(own)]:
                if files.checksum(path / entry["file"]) != entry["xxh3_128"]:
                    found.append((self._host, entry["file"], "another checksum than when it was written"))
        damaged = [flaw for of_rank in processes.gather(found) for flaw in of_rank]
        for host, name, _ in damaged:
            if host == self._host and self._leads:
                (path / name).unlink()
        return damaged

    def _get_manifest(self, choice: Choice, path: Path) -> None:
        """Get the manifest of the chosen copy to a host that lacks it, as one that has come anew does."""
        if self._host in choice.holders or not self._leads:
            return
        shutil.rmtree(path, ignore_errors=True)  # of another attempt
        path.mkdir()
        self._fetch_from(choice.holders, path / MANIFEST, None)

    def _fetch(
        self, path: Path, choice: Choice, held: Sequence[Mapping[int, Held]], manifest: Mapping[str, Any]
    ) -> None:
        """Get a file of the chosen copy from a host that holds it. Ranks of a host get it once."""
        with open(path.with_name(f".{path.name}.lock"), "wb") as lock:
            fcntl.flock(lock, fcntl.LOCK_EX)
            if path.exists():
                return
            checksums = {entry["file"]: entry["xxh3_128"] for entry in manifest["files"]}
            self._fetch_from(holders_of(path.name, choice, held), path, checksums[path.name])

    def _fetch_from(self, hosts: Sequence[int], path: Path, checksum: str | None) -> None:
        """Get a file of a copy from one of the hosts. Raise LostCopyError if none gives it: the copy is then
        of no use to this host, which gives up its part, so that the next attempt does without."""
        flaws = []
        for host in hosts:
            try:
                name = f"{path.parent.name}/{path.name}"
                memory_transfer.fetch(self._addresses[host], self._secret, name, path, checksum)
                return
            except (OSError, ValueError, memory_transfer.NotThereError) as error:
                flaws.append(f"host {host}: {error}")
        shutil.rmtree(path.parent, ignore_errors=True)
        raise LostCopyError(f"{path.name} of the copy in memory could not be read: {'; '.join(flaws)}")

    # Making copies

    def is_due(self, step: int) -> bool:
        """Return whether a copy is to be made after `step` steps."""
        return self.is_on and self._every is not None and step % self._every == 0

    def save(self, step: int, engine: Engine, description: Mapping[str, Any]) -> None:
        """Copy the engine's current state behind training, unless the last one is still on its way to the
        neighbours. What keeps copies from being made is a warning: training needs none of them."""
        if self._saver is None:
            return
        self.finish()
        if self._last is not None and self._last != self._whole:
            states = torch.zeros(2, device=engine.device)
            if self._neighbour is not None:
                states[0], states[1] = float(self._neighbour.is_busy), float(self._neighbour.has_failed)
            is_busy, has_failed = processes.all_sum(states).tolist()
            if is_busy:
                self._warn(f"step {step:,}: the copy in memory of step {self._last:,} is still on its way")
                return
            if has_failed:
                self._warn(f"the copy in memory of step {self._last:,} did not reach all neighbours")
                self._last = self._whole
            else:
                self._whole = self._last
        self._delete(lambda held: held != self._whole)
        self._saver.left_out = self.left_out
        try:
            self._saver.save(step, engine, description, None, self._on_written)
        except TrainingError as error:
            self._fail(error)

    def poll(self) -> None:
        """Advance the copy that is being made; see Saver.poll."""
        self._advance(finish=False)

    def finish(self) -> None:
        """Wait until the copy that is being made is in the memory of all hosts."""
        self._advance(finish=True)

    def _advance(self, finish: bool) -> None:
        if self._saver is None:
            return
        try:
            if finish:
                self._saver.finish()
            else:
                self._saver.poll()
        except TrainingError as error:  # on all ranks
            self._fail(error)

    def _on_written(self, path: Path, _: float) -> None:
        """Hand the manifest, which rank 0 wrote, to all hosts, and send what each holds to its neighbour."""
        text = processes.from_main((path / MANIFEST).read_bytes() if processes.is_main() else None)
        assert text is not None
        self._last = int(path.name.removeprefix("step-"))
        if not self._leads:
            return
        self._neighbour = _Neighbour()
        try:
            if not processes.is_main():
                partial = path.with_name(f".{path.name}.partial")
                files.write_atomically(partial / MANIFEST, text)
                store.settle(partial, self._last)
        except OSError:
            self._neighbour.has_failed = True
            return
        if len(self._ranks) > 1:
            before = (self._host - 1) % len(self._ranks)
            names = {f"rank-{rank:05d}.safetensors" for rank in self._ranks[before]}
            self._neighbour.start(self._addresses[before], self._secret, path, names)

    def _fail(self, error: TrainingError) -> None:
        self._warn(f"no copy in memory: {error.problems[0].got}")
        if self._leads:
            store.tidy(self._folder)

    def _warn(self, text: str) -> None:
        if not self._has_warned:
            self._say(f"warning: {text}; further such warnings are left out")
        self._has_warned = True

    # Deleting them

    def forget(self) -> None:
        """Delete all copies: the run goes back to a checkpoint, and on with other samples."""
        if self._saver is None:
            return
        self.finish()
        if self._neighbour is not None:
            self._neighbour.stop()
        self._delete(lambda step: True)
        self._last = self._whole = None
        processes.barrier()

    def close(self) -> None:
        """End what is under way, without a collective. The copies stay."""
        if self._saver is not None:
            self._saver.abandon()
        if self._neighbour is not None:
            self._neighbour.stop()
        if self._server is not None:
            self._server.close()

    def _delete(self, is_doomed: Callable[[int], bool]) -> None:
        for path in list_steps(self._folder) if self._leads else ():
            if is_doomed(int(path.name.removeprefix("step-"))):
                store.remove(path)


class _Neighbour:
    """Gets the files of a copy that the host before this one holds, in a thread."""

    def __init__(self) -> None:
        self.has_failed = False
        self._is_over = threading.Event()
        self._thread: threading.Thread | None = None

    @property
    def is_busy(self) -> bool:
        return self._thread is not None and self._thread.is_alive()

    def start(self, where: tuple[str, int], secret: bytes, path: Path, names: set[str]) -> None:
        """Get those files of the copy at `path` that have these names."""
        arguments = (where, secret, path, names)
        self._thread = threading.Thread(target=self._work, args=arguments, name="neighbour", daemon=True)
        self._thread.start()

    def stop(self) -> None:
        """Get no further file, and wait a while for the current one."""
        self._is_over.set()
        if self._thread is not None:
            self._thread.join(STOP_SECONDS)

    def _work(self, where: tuple[str, int], secret: bytes, path: Path, names: set[str]) -> None:
        deadline = time.monotonic() + PATIENCE_SECONDS
        try:
            for entry in read_manifest(path)["files"]:
                name = entry["file"]
                while name in names and not (path / name).exists() and not self._is_over.is_set():
                    try:
                        remote = f"{path.name}/{name}"
                        memory_transfer.fetch(where, secret, remote, path / name, entry["xxh3_128"])
                    except memory_transfer.NotThereError:  # that host is about to name its folder
                        if self._is_over.wait(RETRY_SECONDS) or time.monotonic() > deadline:
                            raise
        except Exception:  # told at the next copy
            self.has_failed = True
