"""The location of a corpus: a folder, or a URL whose files come through a bounded local cache.

Tar files are opened here as local files with the content that the manifest says; any other raises
TarFileError with the file's name.
"""

from __future__ import annotations

import fcntl
import os
import stat
from collections.abc import Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any, Protocol

import xxhash

from llmtrain.corpus.cache import Cache
from llmtrain.corpus.cache_folder import RemoteFile
from llmtrain.corpus.manifest import (
    MANIFEST_BYTES,
    MANIFEST_NAME,
    MANIFEST_VALUES,
    PREPARE_AGAIN,
    STAMP_NAME,
    UNFINISHED_NAME,
    TarFileEntry,
)
from llmtrain.corpus.tar_files import TarFileError
from llmtrain.corpus.transport import join
from llmtrain.errors import DataError, Problem
from llmtrain.files import checksum, stamp_of, write_json_atomically
from llmtrain.reading import open_regular, parse_object, read_bytes
from llmtrain.urls import without_credentials

Problems = dict[str, Problem]
"""Tar file → what is wrong with it."""


class Location(Protocol):
    """Where the files of one corpus are."""

    def name(self, file: str) -> str:
        """Return the name of a file in messages."""

    def read(self, file: str, at_most: int, xxh3_128: str | None = None) -> bytes:
        """Return the content of a small file. Raises DataError if it cannot be read, has more than `at_most`
        bytes or does not match its checksum."""

    def local(self, file: str, content: bytes) -> Path:
        """Return the path of a local file with this `content`, which was read from `file`."""

    is_kept: bool
    """Whether open files keep their names: one whose name is gone has been changed, not evicted."""

    def open_tar(self, entry: TarFileEntry) -> int:
        """Return a file descriptor of the tar file's content, which the caller closes. Raises TarFileError if
        it cannot be had."""

    def want(self, entries: Sequence[TarFileEntry]) -> None:
        """Announce that these will be opened soon, in this order."""

    def find_problems(self, entries: Iterable[TarFileEntry], checksums: bool) -> Problems:
        """Return what is wrong with missing, truncated and, with `checksums`, altered tar files, as far as it
        is known before they are opened."""


class Folder:
    """A corpus on a local or shared file system."""

    is_kept = True

    def __init__(self, root: Path) -> None:
        self.root = root
        self._seen: dict[str, tuple[int, ...]] = {}
        """Tar file → its stamp when it was first opened."""

    def name(self, file: str) -> str:
        return str(self.root / file)

    def read(self, file: str, at_most: int, xxh3_128: str | None = None) -> bytes:
        path = self.root / file
        try:
            content = read_bytes(path, at_most)
        except OSError as error:
            raise DataError(_unreadable(str(path), error)) from error
        return check_content(content, xxh3_128, str(path))

    def local(self, file: str, content: bytes) -> Path:
        return self.root / file

    def open_tar(self, entry: TarFileEntry) -> int:
        path = self.root / entry.file
        try:
            descriptor = open_regular(path)
        except OSError as error:
            raise TarFileError(_unreadable(str(path), error)) from error
        try:
            self._check(path, entry, os.fstat(descriptor))
        except BaseException:
            os.close(descriptor)
            raise
        return descriptor

    def _check(self, path: Path, entry: TarFileEntry, status: os.stat_result) -> None:
        if status.st_size != entry.bytes:
            raise TarFileError(_wrong_size(str(path), status.st_size, entry.bytes))
        now = stamp_of(status)
        if self._seen.setdefault(entry.file, now) != now:
            found = _checksum(path)
            if found != entry.xxh3_128:
                got = "a tar file that changed while the job ran"
                raise TarFileError(Problem(str(path), got, f"xxh3_128 {entry.xxh3_128}", PREPARE_AGAIN))
            self._seen[entry.file] = now

    def want(self, entries: Sequence[TarFileEntry]) -> None:
        return None

    def find_problems(self, entries: Iterable[TarFileEntry], checksums: bool) -> Problems:
        entries = list(entries)
        found = dict(_size_problems(self.root, entries))
        if checksums:
            found |= self._altered([entry for entry in entries if entry.file not in found])
        return found

    def _altered(self, entries: Sequence[TarFileEntry]) -> Problems:
        """Return the tar files that do not match their checksum.

        A file beside the manifest keeps the stamps (size and times) of those found good, so that only the
        first start reads the tar files, and only one of many processes that start together. In a folder that
        cannot be written every process reads them at each start.
        """
        stamp_path = self.root / STAMP_NAME
        with _one_at_a_time(self.root / MANIFEST_NAME):
            stamps = _read_stamps(stamp_path)
            # Stamped before reading, so that a change during reading is found at the next start.
            new = {entry.file: [entry.xxh3_128, *_stamp(self.root / entry.file)] for entry in entries}
            unseen = [entry for entry in entries if stamps.get(entry.file) != new[entry.file]]
            if not unseen:
                return {}
            with ThreadPoolExecutor(max_workers=min(8, os.cpu_count() or 1)) as pool:
                checksums = list(pool.map(lambda entry: _checksum(self.root / entry.file), unseen))
            altered = {}
            for entry, found in zip(unseen, checksums, strict=True):
                if found != entry.xxh3_128:
                    del new[entry.file]
                    got = "an altered tar file: its content does not match its checksum"
                    allowed = f"xxh3_128 {entry.xxh3_128}"
                    altered[entry.file] = Problem(self.name(entry.file), got, allowed, PREPARE_AGAIN)
            # A corpus that cannot be written (shared, read-only) is still good; the next start reads it
            # again.
            with suppress(OSError):
                write_json_atomically(stamp_path, new)
        return altered


class RemoteLocation:
    """A corpus behind a URL, read through a local cache."""

    is_kept = False

    def __init__(self, url: str, cache: Cache) -> None:
        self.url = url
        self.cache = cache

    def name(self, file: str) -> str:
        return without_credentials(join(self.url, file))

    def read(self, file: str, at_most: int, xxh3_128: str | None = None) -> bytes:
        return self.cache.read_small(join(self.url, file), at_most, xxh3_128)

    def local(self, file: str, content: bytes) -> Path:
        return self.cache.keep(content, Path(file).suffix)

    def open_tar(self, entry: TarFileEntry) -> int:
        return self.cache.open(join(self.url, entry.file), entry.bytes, entry.xxh3_128)

    def want(self, entries: Sequence[TarFileEntry]) -> None:
        self.cache.want([RemoteFile(join(self.url, e.file), e.bytes, e.xxh3_128) for e in entries])

    def find_problems(self, entries: Iterable[TarFileEntry], checksums: bool) -> Problems:
        return {}  # known only after download


def not_a_corpus(path: Path) -> Problem:
    """Return what is at a path that holds no manifest."""
    remedy = "make one with: llmtrain prepare source=… output=…"
    if not os.path.exists(path):
        return Problem(str(path), "no such folder", "a corpus", remedy)
    if not path.is_dir():
        return Problem(str(path), "a file", "the folder of a corpus", remedy)
    if (path / UNFINISHED_NAME).exists():
        return Problem(str(path), "an unfinished corpus", "a whole one", "run its llmtrain prepare again")
    names = sorted(entry.name for entry in os.scandir(path))
    shown = ", ".join(names[:4]) + (f" and {len(names) - 4} more" if len(names) > 4 else "")
    got = f"a folder without {MANIFEST_NAME} (holds {shown or 'nothing'})"
    return Problem(str(path), got, "a corpus", remedy)


def check_content(content: bytes, xxh3_128: str | None, where: str) -> bytes:
    """Return `content`. Raises DataError unless it matches its checksum."""
    if xxh3_128 is not None and xxhash.xxh3_128_hexdigest(content) != xxh3_128:
        got = "an altered file: its content does not match its checksum"
        raise DataError(Problem(where, got, f"xxh3_128 {xxh3_128}", PREPARE_AGAIN))
    return content


def _stamp(path: Path) -> tuple[int, ...]:
    try:
        return stamp_of(os.stat(path))
    except OSError as error:
        raise TarFileError(_unreadable(str(path), error)) from error


def _size_problems(root: Path, entries: Iterable[TarFileEntry]) -> Iterator[tuple[str, Problem]]:
    prefix = str(root)
    for entry in entries:
        path = os.path.join(prefix, entry.file)
        try:
            status = os.stat(path)
        except OSError as error:
            yield entry.file, _unreadable(path, error)
            continue
        if not stat.S_ISREG(status.st_mode):
            yield entry.file, Problem(path, "no file", "a file of the corpus", PREPARE_AGAIN)
        elif status.st_size != entry.bytes:
            yield entry.file, _wrong_size(path, status.st_size, entry.bytes)


def _unreadable(path: str, error: OSError) -> Problem:
    if isinstance(error, FileNotFoundError):
        return Problem(path, "no such file", "a file of the corpus", PREPARE_AGAIN)
    return Problem(path, str(error.strerror), "a readable file", "check its permissions and its disk")


def _wrong_size(path: str, size: int, expected: int) -> Problem:
    kind = "a truncated tar file" if size < expected else "a tar file that is too long"
    return Problem(path, f"{kind} of {size} bytes", f"{expected} bytes", PREPARE_AGAIN)


def _checksum(path: Path) -> str:
    try:
        return checksum(path)
    except OSError as error:
        raise TarFileError(_unreadable(str(path), error)) from error


@contextmanager
def _one_at_a_time(path: Path) -> Iterator[None]:
    """Hold a lock on `path` against other processes. Without a lock if the folder cannot be written, so that
    no stamp is worth waiting for, or if the file system has no locks."""
    with open(path, "rb", opener=open_regular) as file:
        if os.access(path.parent, os.W_OK):
            with suppress(OSError):
                fcntl.flock(file, fcntl.LOCK_EX)
        yield


def _read_stamps(path: Path) -> dict[str, list[Any]]:
    try:
        return parse_object(read_bytes(path, MANIFEST_BYTES), most=MANIFEST_VALUES)
    except (OSError, ValueError):
        return {}
