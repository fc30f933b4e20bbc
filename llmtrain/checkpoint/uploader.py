"""Upload checkpoints behind training, the newest first, in a thread that calls no collective."""

from __future__ import annotations

import os
import threading
from collections import deque
from collections.abc import Callable, Collection
from pathlib import Path

from llmtrain.checkpoint.remote import RemoteRun
from llmtrain.checkpoint.retention import Rules
from llmtrain.errors import DataError, Problem, UserError

CLOSING_SECONDS = 10.0
"""Seconds to wait, at the end of a run, for a request that the store does not answer."""


class Uploader:
    """Keeps the remote copy of a run up to date. For rank 0 alone."""

    def __init__(
        self, remote: RemoteRun, rules: Callable[[], Rules], on_uploaded: Callable[[Path], None]
    ) -> None:
        """rules: which checkpoints are kept there. on_uploaded: called by the thread after each upload."""
        self._remote, self._rules, self._on_uploaded = remote, rules, on_uploaded
        self._waiting: list[Path] = []
        self._current: Path | None = None
        self._failure: UserError | None = None
        self._notes: deque[str] = deque()
        self._is_closing = False
        self._changed = threading.Condition()
        self._thread = threading.Thread(target=self._work, name="upload", daemon=True)
        self._thread.start()

    def submit(self, path: Path) -> None:
        """Upload a checkpoint of the run folder, or what has changed of it, soon."""
        with self._changed:
            self._waiting = sorted({*self._waiting, path})
            self._changed.notify_all()

    @property
    def held(self) -> Collection[Path]:
        """The checkpoints that must not be deleted now."""
        with self._changed:
            newest = self._waiting[-1:]
            return {*newest, *([] if self._current is None else [self._current])}

    def notes(self) -> list[str]:
        """Return what there is to say since the last call."""
        said = []
        while self._notes:
            said.append(self._notes.popleft())
        return said

    def wait(self, seconds: float) -> bool:
        """Wait at most so long until nothing is left to upload. Return whether that is so."""
        with self._changed:
            return self._changed.wait_for(lambda: self._current is None and not self._waiting, seconds)

    @property
    def failure(self) -> UserError | None:
        """Why the last attempt failed; None if it did not."""
        with self._changed:
            return self._failure

    def close(self) -> None:
        """End the upload at its next chunk. What it has copied is not copied again by a later one."""
        with self._changed:
            self._is_closing = True
            self._waiting = []
            self._changed.notify_all()
        self._remote.folder.stop()
        self._thread.join(CLOSING_SECONDS)

    def _work(self) -> None:
        while True:
            with self._changed:
                self._current = None
                self._changed.notify_all()
                self._changed.wait_for(lambda: self._waiting or self._is_closing)
                if self._is_closing:
                    return
                self._current = path = self._waiting.pop()
            failure = self._upload(path)
            with self._changed:
                self._failure = failure
            if failure is not None:
                self._notes.append(f"warning: {path.name} was not uploaded: {failure}")

    def _prune(self, current: Path) -> None:
        try:
            self._remote.prune(current, self._rules())
        except InterruptedError:
            raise
        except (UserError, OSError) as error:  # training needs none of this
            self._notes.append(f"warning: old remote checkpoints could not be deleted: {error}")

    def _upload(self, path: Path) -> UserError | None:
        """Upload a checkpoint. Return why that failed; None if it did not, or there is nothing to upload."""
        try:
            if self._remote.upload(path):
                self._on_uploaded(path)
                self._prune(path)
        except InterruptedError:  # the run ends
            return None
        except Exception as error:  # the thread must live: the end of the run waits for it
            # An older checkpoint that retention has deleted meanwhile is none to upload.
            return _failure(error, path) if os.path.isdir(path) else None
        return None


def _failure(error: Exception, path: Path) -> UserError:
    if isinstance(error, UserError):
        return error
    reason = error.strerror if isinstance(error, OSError) and error.strerror else str(error)
    name = getattr(error, "filename", None) or path
    return DataError(Problem(str(name), f"{type(error).__name__}: {reason}"))
