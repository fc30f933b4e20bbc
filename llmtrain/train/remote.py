"""A run's copy elsewhere (checkpoint.remote): checked before training, fetched on a new machine, and kept up
to date behind training."""

from __future__ import annotations

import shutil
from collections.abc import Callable, Collection
from pathlib import Path
from typing import TypeVar

from llmtrain.checkpoint import retention
from llmtrain.checkpoint.config import CheckpointConfig
from llmtrain.checkpoint.remote import RemoteRun
from llmtrain.checkpoint.retention import Rules
from llmtrain.checkpoint.uploader import Uploader
from llmtrain.distributed import processes
from llmtrain.errors import CheckpointError, DataError, Problem, TrainingError, UserError
from llmtrain.standard_streams import Say
from llmtrain.train.spikes import Note
from llmtrain.urls import without_credentials

T = TypeVar("T")

WAIT_SECONDS = 30.0
"""How long one rank waits for an upload before it tells the others that it still does."""


class RemoteCopy:
    """The copy of a run; without checkpoint.remote nothing is done. All ranks call its methods alike."""

    def __init__(self, config: CheckpointConfig, run_dir: Path, say: Say, note: Note) -> None:
        self._config, self._run_dir, self._say, self._note = config, run_dir, say, note
        self._root = run_dir / "checkpoints"
        self._remote: RemoteRun | None = None
        self._uploader: Uploader | None = None

    def open(self) -> None:
        """Look at what is there, and get the newest checkpoint if the run folder has none that is as new.

        Raise CheckpointError if the store refuses, or holds a run with checkpoint.resume=never.
        """
        url, resume = self._config.remote, self._config.resume
        if url is None:
            return
        names = processes.from_main(processes.agree(lambda: self._look(url)))
        if resume == "never" and names:
            remedy = "use checkpoint.resume=auto to go on, or another checkpoint.remote"
            raise self._refusal(Problem(self._key, f"a folder that holds {names[-1]}", "no run", remedy))
        if resume == "auto" and names:
            self._fetch_newest(names)

    def begin(self, step: int, rules: Callable[[], Rules]) -> None:
        """Start to upload what the run folder has and the copy has not.

        step: that of the checkpoint that the run resumes from, after which nothing counts any more. rules:
        which checkpoints are kept there."""
        if self._remote is None:
            return
        remote = self._remote

        def start() -> None:
            self._on_store(lambda: remote.delete_after(step))
            self._uploader = Uploader(remote, rules, self._on_uploaded)
            for path in retention.list_steps(self._root):
                self._uploader.submit(path)

        processes.on_main(start)

    def submit(self, path: Path) -> None:
        """Upload a checkpoint, or what has changed of it, behind training."""
        if self._uploader is not None:
            self._uploader.submit(path)

    @property
    def held(self) -> Collection[Path]:
        """The checkpoints of the run folder that must not be deleted now."""
        return () if self._uploader is None else self._uploader.held

    def poll(self) -> None:
        """Say what there is to say of uploads."""
        for text in () if self._uploader is None else self._uploader.notes():
            self._say(text)

    def finish(self) -> None:
        """Wait until the newest checkpoint is uploaded. Raise TrainingError if it cannot be."""
        if self._remote is None:
            return
        uploader = self._uploader
        if uploader is not None and uploader.failure is not None:
            for path in retention.list_steps(self._root)[-1:]:
                uploader.submit(path)
        # In short rounds: the others would give up on a rank that is silent for long.
        while not processes.from_main(uploader.wait(WAIT_SECONDS) if uploader is not None else True):
            self.poll()
        self.poll()
        processes.on_main(self._raise_failure)

    def close(self) -> None:
        """End uploads that are under way; the next start goes on with them."""
        if self._uploader is not None:
            self._uploader.close()

    @property
    def _key(self) -> str:
        return f"checkpoint.remote={without_credentials(self._config.remote or '')}"

    def _look(self, url: str) -> list[str]:
        """Return the names of the checkpoints that are there, on rank 0."""
        remote = self._remote = self._on_store(
            lambda: RemoteRun(url, self._run_dir, self._config.remote_verify)
        )
        if not processes.is_main():
            return []
        self._on_store(remote.folder.probe)
        if not self._on_store(remote.belongs):
            remedy = (
                "give it another checkpoint.remote, or start from an empty run.dir to go on with that one"
            )
            raise CheckpointError(
                Problem(self._key, f"the copy of another run than {self._run_dir}", "", remedy)
            )
        return self._on_store(remote.refresh)

    def _on_store(self, action: Callable[[], T]) -> T:
        """Return what an action gives; its error is one of checkpoint.remote."""
        try:
            return action()
        except DataError as error:
            problems = [
                Problem(f"checkpoint.remote: {p.where}", p.got, p.allowed, p.remedy) for p in error.problems
            ]
            raise CheckpointError(problems) from error

    def _fetch_newest(self, names: list[str]) -> None:
        """Get the newest good one of these checkpoints, unless the run folder has one that is as new."""
        own, _ = retention.newest_good(self._root, self._say)
        newer = [name for name in reversed(names) if own is None or name > own.path.name]
        rejected: list[str] = []
        for name in newer:
            problem = self._fetch(name)
            if problem is None:
                return
            rejected.append(f"{name}: {problem}")
            self._say(f"damaged remote checkpoint passed over: {rejected[-1]}")
        if rejected and own is None:
            remedy = "restore one from elsewhere, or give another run.dir and checkpoint.remote to start anew"
            raise self._refusal(Problem(self._key, f"only damaged checkpoints ({rejected[0]})", "", remedy))

    def _fetch(self, name: str) -> str | None:
        """Get a checkpoint; ranks share its files. Return what is wrong with it, or None."""
        remote = self._remote
        assert remote is not None
        self._say(f"fetching {name} from {without_credentials(self._config.remote or '')}")
        listed = processes.from_main(remote.listed(name) if processes.is_main() else [])
        partial = self._root / f".{name}.partial"

        def make() -> None:
            shutil.rmtree(partial, ignore_errors=True)
            partial.mkdir(parents=True)

        processes.on_main(make)
        problem: str | None = None
        try:
            own = listed[processes.rank() :: processes.world_size()]
            found = (remote.fetch_file(name, entry, partial) for entry in own)
            problem = next((wrong for wrong in found if wrong is not None), None)
        except OSError as error:
            problem = f"{error.strerror or error} in {partial}"
        problems = [found for found in processes.gather(problem) if found is not None]
        if problems:
            processes.on_main(lambda: shutil.rmtree(partial, ignore_errors=True))
            return problems[0]

        def settle() -> None:
            self._on_store(remote.fetch_record)
            remote.settle(name, partial)

        processes.on_main(settle)
        return None

    def _on_uploaded(self, path: Path) -> None:
        self._note("upload", int(path.name.split("-")[1]))

    def _raise_failure(self) -> None:
        failure: UserError | None = None if self._uploader is None else self._uploader.failure
        if failure is not None:
            problem = failure.problems[0]
            remedy = f"{self._run_dir} is complete: run the same command to upload what is left"
            raise TrainingError(Problem(self._key, f"{problem.where}: {problem.got}", "", remedy))

    def _refusal(self, problem: Problem) -> UserError:
        return processes.everywhere(CheckpointError(problem))
