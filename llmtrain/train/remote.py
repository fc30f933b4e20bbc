"""A run's copy elsewhere (checkpoint.remote): checked before training, fetched on a new machine, and kept up
to date behind training."""

from __future__ import annotations

import shutil
import threading
import time
from collections.abc import Callable, Collection
from concurrent.futures import Future, wait
from pathlib import Path
from typing import TypeVar

from llmtrain import files
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
"""How long one rank waits for an upload, or downloads, before it tells the others that it is still at
work."""
POLL_SECONDS = 0.5
"""How often a rank that waits looks whether it is asked to stop."""


class RemoteCopy:
    """The copy of a run; without checkpoint.remote nothing is done. All ranks call its methods alike."""

    def __init__(self, config: CheckpointConfig, run_dir: Path, say: Say, note: Note) -> None:
        self._config, self._run_dir, self._say, self._note = config, run_dir, say, note
        self._root = run_dir / "checkpoints"
        self._remote: RemoteRun | None = None
        self._uploader: Uploader | None = None
        self._gives_up: float | None = None

    def open(self) -> None:
        """Look at what is there, and get the newest checkpoint if the run folder has none that is as new.

        Raise CheckpointError if the store refuses or fails, and where a run that begins anew, by itself or
        from another run's checkpoint, would write over the copy of one. Nothing there is changed then.
        """
        url, resume = self._config.remote, self._config.resume
        if url is None:
            return
        names = processes.from_main(processes.agree(lambda: self._look(url)))
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
        """Report finished and failed uploads."""
        for text in () if self._uploader is None else self._uploader.notes():
            self._say(text)

    def finish(self, stops: Callable[[], bool], seconds: Callable[[], float]) -> bool:
        """Wait until the newest checkpoint is uploaded, and return True.

        After a request to stop, wait so many seconds at most, and return False if it is not uploaded then:
        the next start does that. Raise TrainingError if it cannot be uploaded, unless the run is to stop.
        stops, seconds: asked on rank 0 alone.
        """
        if self._remote is None:
            return True
        uploader = self._uploader
        if uploader is not None and uploader.failure is not None:
            for path in retention.list_steps(self._root)[-1:]:
                uploader.submit(path)
        is_over: bool | None = None
        while is_over is None:
            # In short rounds: the others would give up on a rank that is silent for long.
            is_over = processes.from_main(self._wait(stops, seconds))
            self.poll()
        has_failed = uploader is not None and uploader.failure is not None
        if not is_over or processes.from_main(has_failed and stops()):
            self._say(f"warning: {self._key} is not complete yet; the next start uploads the rest")
            return False
        processes.on_main(self._raise_failure)
        return True

    def close(self) -> None:
        """End uploads that are under way; the next start goes on with them."""
        if self._uploader is not None:
            self._uploader.close()

    def _wait(self, stops: Callable[[], bool], seconds: Callable[[], float]) -> bool | None:
        """Wait for uploads for a while, on rank 0. Return whether they are done, False if they have had all
        the time that there is; None: neither yet."""
        if self._uploader is None:
            return True
        until = time.monotonic() + WAIT_SECONDS
        while not self._uploader.wait(POLL_SECONDS):
            now = time.monotonic()
            if self._gives_up is None and stops():
                self._gives_up = now + seconds()
            if self._gives_up is not None and now >= self._gives_up:
                return False
            if now >= until:
                return None
        return True

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
        if self._begins_anew() and (names := self._on_store(remote.refresh)):
            remedy = "use checkpoint.resume=auto to go on, or another checkpoint.remote"
            raise CheckpointError(Problem(self._key, f"a folder that holds {names[-1]}", "no run", remedy))
        if not self._on_store(remote.belongs):
            remedy = (
                "give it another checkpoint.remote, or start from an empty run.dir to go on with that one"
            )
            raise CheckpointError(
                Problem(self._key, f"the copy of another run than {self._run_dir}", "", remedy)
            )
        return self._on_store(remote.refresh)

    def _begins_anew(self) -> bool:
        """Return whether no checkpoint of this run is where it begins: it is a new one, or another's fork."""
        resume = self._config.resume
        if resume in ("auto", "never"):
            return resume == "never"
        is_own = files.expand_home(resume).resolve().is_relative_to(self._run_dir.resolve())
        return not is_own and not retention.list_steps(self._root)

    def _on_store(self, action: Callable[[], T]) -> T:
        """Return the result of an action; let its error name checkpoint.remote."""
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
        remote = self._remote
        assert remote is not None
        # A run that went back was perhaps killed before it deleted there what it left behind.
        left = processes.from_main(remote.set_aside(names) if processes.is_main() else [])
        newer = [
            name for name in reversed(names) if name not in left and (own is None or name > own.path.name)
        ]
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
        """Get a checkpoint; ranks share its files. Return what is wrong with it, or None.

        Raise CheckpointError for a store that fails and a disk that cannot be written: the checkpoint may be
        good, and going on from an older one would delete it.
        """
        remote = self._remote
        assert remote is not None
        self._say(f"fetching {name} from {without_credentials(self._config.remote or '')}")
        listed = processes.from_main(remote.listed(name) if processes.is_main() else [])
        partial = self._root / f".{name}.partial"

        def make() -> None:
            shutil.rmtree(partial, ignore_errors=True)
            partial.mkdir(parents=True)

        def fetch() -> str | None:
            own = listed[processes.rank() :: processes.world_size()]
            found = (remote.fetch_file(name, entry, partial) for entry in own)
            return next((wrong for wrong in found if wrong is not None), None)

        def settle() -> None:
            remote.fetch_record()
            remote.settle(name, partial)

        processes.on_main(lambda: self._getting(make))
        problems: list[str] = []
        try:
            problem = self._in_rounds(lambda: self._getting(fetch))
            problems = [found for found in processes.gather(problem) if found is not None]
            if not problems:
                processes.on_main(lambda: self._getting(settle))
        finally:
            if processes.is_main():
                shutil.rmtree(partial, ignore_errors=True)
        return problems[0] if problems else None

    def _getting(self, action: Callable[[], T]) -> T:
        """Return the result of an action that reads the store and writes the run folder."""
        try:
            return self._on_store(action)
        except OSError as error:
            raise CheckpointError(files.disk_problem(error, self._run_dir, key="run.dir")) from error

    def _in_rounds(self, action: Callable[[], T]) -> T:
        """Run an action of the store in a thread, however long it takes, and return its result. All ranks
        call it; raise a UserError of one on all of them."""
        done: Future[T] = Future()

        def work() -> None:
            try:
                done.set_result(action())
            except BaseException as error:
                done.set_exception(error)

        threading.Thread(target=work, name="download", daemon=True).start()
        try:
            # In short rounds, as in `finish`.
            while any(processes.gather(bool(wait([done], WAIT_SECONDS).not_done))):
                continue
        except BaseException:
            if self._remote is not None:
                self._remote.folder.stop()
            raise
        return processes.agree(done.result)

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
