"""A folder in an object store or on another file system that is written to: s3 by pyarrow, every other scheme
by fsspec.

A file appears whole or not at all, in object stores since they work so, and on file systems by a temporary
name. Temporary failures are retried with growing waits, as in transport.py; messages show a URL without its
credentials.
"""

from __future__ import annotations

import os
import secrets
import threading
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import IO, Any, TypeVar

import xxhash

from llmtrain.corpus.tar_files import TarFileError
from llmtrain.corpus.transport import next_wait
from llmtrain.corpus.transport_source import PassingError, is_http
from llmtrain.corpus.transport_stores import S3File, StoreFile
from llmtrain.errors import DataError, Problem
from llmtrain.files import atomic_writer, no_follow_opener, open_regular
from llmtrain.urls import without_credentials

T = TypeVar("T")

CHUNK_BYTES = 8 << 20
TIMEOUT_SECONDS = 60.0
RETRIES = 8
"""Failures in a row of one operation that are tried again."""
WRITABLE = "s3://…, gs://…, az://…, file:///… or another file system that fsspec writes to"


class RemoteFolder:
    """Files below a URL, by names with /. Safe from several threads.

    Its methods raise DataError for missing access or a missing package, and when all retries have failed;
    InterruptedError after `stop`.
    """

    def __init__(self, url: str, retries: int = RETRIES) -> None:
        """Open nothing yet. Raise DataError for a URL that cannot be written to."""
        self.url = url.rstrip("/")
        self._shown = without_credentials(self.url)
        self._retries = retries
        self._stopped = threading.Event()
        if is_http(url):
            raise DataError(Problem(self._shown, "a web server, which takes no files", WRITABLE))
        is_s3 = url.startswith(("s3://", "s3a://"))
        self._file: StoreFile = S3File(self.url, TIMEOUT_SECONDS) if is_s3 else StoreFile(self.url)
        self._opened: tuple[Any, str] | None = None
        self._lock = threading.Lock()

    def stop(self) -> None:
        """End the waits and uploads of all threads."""
        self._stopped.set()

    def sizes(self, name: str = "") -> dict[str, int]:
        """Return name → size of all files below the folder `name`; none if there is no such folder."""

        def listed(system: Any, root: str) -> dict[str, int]:
            folder = f"{root}/{name}".rstrip("/")
            return {path.removeprefix(f"{root}/"): size for path, size in _files_below(system, folder)}

        return self._try("", listed)

    def read(self, name: str, at_most: int) -> bytes:
        """Return the content of a small file. Raise DataError if there is none, or it is larger."""

        def content(system: Any, root: str) -> bytes:
            with system.open(f"{root}/{name}", "rb") as file:
                found: bytes = file.read(at_most + 1)
            if len(found) > at_most:
                got = f"a file of more than {at_most:,} bytes"
                raise DataError(Problem(f"{self._shown}/{name}", got, f"{at_most:,} bytes at most"))
            return found

        return self._try(name, content)

    def checksum(self, name: str) -> str:
        """Return the xxh3-128 of a file's content, in hex."""
        return self._try(name, lambda system, root: self._copy(system, f"{root}/{name}", None))

    def get(self, name: str, target: Path) -> str:
        """Copy a file to `target`, which is replaced, and return the xxh3-128 of its content. Raise OSError
        if `target` cannot be written."""

        def copied(system: Any, root: str) -> str:
            with _local(target, "wb") as file:
                found = self._copy(system, f"{root}/{name}", file)
                file.flush()
                os.fsync(file.fileno())
            return found

        return self._try(name, copied)

    def put(self, name: str, source: Path) -> None:
        """Copy the local file `source` here. Raise FileNotFoundError if it is gone."""
        if not source.exists():
            raise FileNotFoundError(source)

        def copied(system: Any, root: str) -> None:
            with (
                open(source, "rb", opener=open_regular) as file,
                _written(system, f"{root}/{name}") as target,
            ):
                # A file that grows meanwhile, such as metrics, is copied up to its present end.
                left = os.fstat(file.fileno()).st_size
                while left > 0 and (chunk := file.read(min(CHUNK_BYTES, left))):
                    self._check_open()
                    target.write(chunk)
                    left -= len(chunk)

        self._try(name, copied)

    def write(self, name: str, content: bytes) -> None:
        """Put a small file here."""

        def written(system: Any, root: str) -> None:
            with _written(system, f"{root}/{name}") as file:
                file.write(content)

        self._try(name, written)

    def delete(self, names: Iterable[str]) -> None:
        """Delete files in this order; those that are gone already are passed over."""
        for name in names:

            def deleted(system: Any, root: str, name: str = name) -> None:
                with suppress(FileNotFoundError):
                    system.rm_file(f"{root}/{name}")

            self._try(name, deleted)

    def probe(self) -> None:
        """Write, list, read and delete a small file. Raise DataError if any of it is not permitted."""
        name, content = f".probe-{secrets.token_hex(6)}", b"llmtrain\n"
        self.write(name, content)
        if name not in self.sizes() or self.read(name, 100) != content:
            got = "a folder that does not give back what was written to it"
            raise DataError(Problem(self._shown, got, WRITABLE))
        self.delete([name])

    def _copy(self, system: Any, path: str, target: IO[bytes] | None) -> str:
        digest = xxhash.xxh3_128()
        with system.open(path, "rb") as file:
            while chunk := file.read(CHUNK_BYTES):
                self._check_open()
                digest.update(chunk)
                if target is not None:
                    target.write(chunk)
        return digest.hexdigest()

    def _check_open(self) -> None:
        if self._stopped.is_set():
            raise InterruptedError("the end of the run")

    def _try(self, name: str, action: Callable[[Any, str], T]) -> T:
        """Return the result of an action on the store, tried again after temporary failures."""
        failures = 0
        while True:
            self._check_open()
            try:
                with self._lock:
                    self._opened = self._opened or self._file.open_store()
                return action(*self._opened)
            except (DataError, InterruptedError, _LocalError):
                raise
            except Exception as error:
                # Each store has its own errors, most of them direct subclasses of Exception.
                failures += 1
                self._wait(name, self._file.failure(error), failures)

    def _wait(self, name: str, failure: Exception, failures: int) -> None:
        """Wait before the next attempt. Raise DataError for a permanent failure, and after too many."""
        where = f"{self._shown}/{name}".rstrip("/")
        if isinstance(failure, DataError):
            [problem, *_] = failure.problems
            remedy = problem.remedy.replace("that may read it", "that may read and write there")
            if isinstance(failure, TarFileError):
                got, remedy = problem.got.replace("no such file", "nothing there"), "check the URL"
                raise DataError(Problem(where, got, "", remedy))
            raise DataError(Problem(where, problem.got, problem.allowed, remedy))
        assert isinstance(failure, PassingError)
        if failures > self._retries:
            got = f"no success in {failures} attempts ({failure.reason})"
            raise DataError(Problem(where, got, "", "check the store"))
        self._stopped.wait(next_wait(failures))


class _LocalError(OSError):
    """The local file, not the store, is at fault."""


@contextmanager
def _local(path: Path, mode: str) -> Iterator[IO[bytes]]:
    """Open a local file; its errors are no reason to try again."""
    try:
        file = open(path, mode, opener=no_follow_opener)  # noqa: SIM115
    except OSError as error:
        raise _LocalError(error.errno, error.strerror, str(path)) from error
    with file:
        yield file


@contextmanager
def _written(system: Any, path: str) -> Iterator[Any]:
    """Yield a file of a store to write to, which appears under its name at the end of the block."""
    if "file" not in (system.protocol if isinstance(system.protocol, tuple) else (system.protocol,)):
        with system.open(path, "wb") as file:
            yield file
        return
    final = Path(path)
    final.parent.mkdir(parents=True, exist_ok=True)
    with atomic_writer(final) as file:
        yield file


def _files_below(system: Any, folder: str) -> Iterator[tuple[str, int]]:
    # Not system.find, which takes a folder that may not be read for an empty one.
    system.invalidate_cache()
    try:
        entries = system.ls(folder, detail=True)
    except FileNotFoundError:
        return
    for entry in entries:
        name = entry["name"].rstrip("/")
        if name == folder.rstrip("/"):  # the placeholder of a folder
            continue
        if entry["type"] == "directory":
            yield from _files_below(system, name)
        else:
            yield name, int(entry["size"] or 0)
