"""The folder of a cache: its files, their locks and times of use, and which of them make room.

A file's name is its checksum and size, so that corpora that share tar files share cached files.
`NAME.partial` is a file that is still being downloaded, by whoever holds its lock; the next process resumes
the partial file of a killed one. The least recently used file is evicted first.

The modification time of the empty file `NAME.used` is the last use of a file. The file's own times are never
changed: with its size they tell a file that this process has verified from one that was altered since.
"""

from __future__ import annotations

import errno
import fcntl
import logging
import os
import re
from collections.abc import Callable, Collection, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path

from llmtrain.corpus.tar_files import TarFileError
from llmtrain.corpus.transport_source import UPLOAD_AGAIN
from llmtrain.errors import DataError, Problem
from llmtrain.files import checksum, disk_problem, expand_home, stamp_of
from llmtrain.urls import without_credentials

PARTIAL = ".partial"
USED = ".used"
LOCK_NAME = ".lock"
_NAME = re.compile(r"[0-9a-f]{32}-\d+(\.partial)?")
logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class RemoteFile:
    """A file behind a URL, and the content that it must have."""

    url: str
    size: int
    """Bytes."""
    xxh3_128: str
    """Checksum of its content, in hex."""

    @property
    def name(self) -> str:
        """Its name in a cache."""
        return f"{self.xxh3_128}-{self.size}"

    @property
    def needs(self) -> str:
        """What a message about the disk says is needed."""
        return f"{self.size:,} bytes for {without_credentials(self.url)}"


class NoRoomError(Exception):
    """Other downloads, or files that this process will use, take the room now."""


class CacheFolder:
    """Verified files in at most `most_bytes`. Safe from many threads, and from many processes at once.

    wanted: returns the names of files that this process will use, which are evicted last.
    on_eviction: called for each evicted file.
    """

    def __init__(
        self,
        folder: Path,
        most_bytes: int,
        *,
        wanted: Callable[[], Collection[str]],
        on_eviction: Callable[[], None],
    ) -> None:
        self.path = expand_home(folder)
        self._most_bytes = most_bytes
        self._wanted = wanted
        self._on_eviction = on_eviction
        self._verified: dict[str, tuple[int, ...]] = {}
        """Name → inode and stamp of the file that this process has verified."""

    def partial(self, file: RemoteFile) -> Path:
        """Return the path into which the file is downloaded."""
        return self.path / f"{file.name}{PARTIAL}"

    def open(self, file: RemoteFile) -> int:
        """Return a descriptor of the file, open for reading. Raises FileNotFoundError."""
        return os.open(self.path / file.name, os.O_RDONLY | os.O_NOFOLLOW)

    def claim(self, file: RemoteFile, *, spare_wanted: bool = False) -> int | None:
        """Return a descriptor of the partial file, locked, with room made for the whole file; None if the
        file is here and good. The caller passes the descriptor to `install` or closes it.

        spare_wanted: evict no file that this process will use.
        Raises NoRoomError while others take the room, TarFileError for a checksum that is none, DataError for
        a file larger than the cache and for a disk that fails.
        """
        where = without_credentials(file.url)
        if not _NAME.fullmatch(file.name):
            # The checksum comes from a manifest that anybody may have written, and becomes part of a path.
            raise TarFileError(Problem(where, f"xxh3_128 {file.xxh3_128!r}", "32 hex digits", UPLOAD_AGAIN))
        if file.size > self._most_bytes:
            allowed = f"at most data.cache.bytes={self._most_bytes:,} bytes"
            got = f"a file of {file.size:,} bytes"
            raise DataError(Problem(where, got, allowed, "raise data.cache.bytes"))
        with self.disk_errors(file):
            while not self._is_good(file):
                if (descriptor := self._begin(file, spare_wanted)) is not None:
                    return descriptor
        return None

    def install(self, file: RemoteFile, descriptor: int) -> str:
        """Verify the downloaded partial file, whose descriptor this is, and give it its final name. Return
        its checksum: another than the file's for a download that was altered, which is then emptied.

        The file is not synced to the disk: whoever finds it after a crash of the machine verifies it.
        """
        partial = self.partial(file)
        with self.disk_errors(file):
            found = checksum(partial)
            if found == file.xxh3_128:
                with self._lock():
                    os.replace(partial, self.path / file.name)
                self._verified[file.name] = _state(os.fstat(descriptor))
            else:
                os.truncate(partial, 0)
        return found

    def discard(self, file: RemoteFile) -> None:
        """Remove the partial file."""
        # Under the lock, so that nobody opens it before its removal and locks it afterwards.
        with self.disk_errors(file), self._lock():
            self.partial(file).unlink(missing_ok=True)

    def free(self, file: RemoteFile, *, spare_wanted: bool) -> tuple[int, bool]:
        """Evict files of about the size of `file` from a disk that is full.

        Returns the bytes of the evicted files, and whether other downloads run, whose end may leave room.
        """
        with self.disk_errors(file), self._lock():
            spared = self._wanted() if spare_wanted else ()
            entries = self._entries(self.partial(file).name)
            freed = 0
            for entry in entries:
                if freed < file.size and entry.evictable and entry.content not in spared:
                    freed += self._evict(entry)
            return freed, not all(entry.evictable for entry in entries)

    @contextmanager
    def disk_errors(self, file: RemoteFile) -> Iterator[None]:
        """Turn each OSError of the block into a DataError."""
        try:
            yield
        except OSError as error:
            raise DataError(self.disk_problem(error, file.needs)) from error

    def disk_problem(self, error: OSError, needed: str) -> Problem:
        """Return what to tell the user of an error of the disk on which `needed` was to be written."""
        if error.errno in (errno.ENOLCK, errno.ENOSYS, errno.EOPNOTSUPP):
            got = f"a file system without locks ({error.strerror})"
            where = f"data.cache.dir={self.path}"
            return Problem(where, got, "a disk of this machine", "choose another data.cache.dir")
        remedy = "make room, or choose another data.cache.dir or a smaller data.cache.bytes"
        return disk_problem(error, self.path, key="data.cache.dir", allowed=needed, if_full=remedy)

    def _is_good(self, file: RemoteFile) -> bool:
        """Return whether the file is here and has its content; remove an altered one.

        Each process reads each file once: a disk, too, may flip a byte.
        """
        path = self.path / file.name
        try:
            status = os.stat(path)
            state = _state(status)
            if self._verified.get(file.name) != state:
                found = checksum(path) if status.st_size == file.size else f"{status.st_size} bytes"
                if found != file.xxh3_128:
                    logger.warning("%s was altered in the cache: it is downloaded again", path)
                    path.unlink(missing_ok=True)
                    return False
                self._verified[file.name] = state
            _note_use(path)
            return True
        except FileNotFoundError:
            return False

    def _begin(self, file: RemoteFile, spare_wanted: bool) -> int | None:
        """Return the partial file, open and locked for this thread, with room made for the whole file.

        None: another thread or process downloaded it meanwhile, or ended before it had. Raises NoRoomError.
        """
        self.path.mkdir(parents=True, exist_ok=True)
        partial = self.partial(file)
        descriptor = -1
        try:
            with self._lock():
                if os.path.exists(self.path / file.name):
                    return None
                descriptor = os.open(partial, os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW, 0o644)
                if _try_lock(descriptor):
                    if self._make_room(file.size, partial.name, self._wanted() if spare_wanted else ()):
                        mine, descriptor = descriptor, -1
                        return mine
                    if os.fstat(descriptor).st_size == 0:
                        partial.unlink()
                    raise NoRoomError
            fcntl.flock(descriptor, fcntl.LOCK_EX)
            return None
        finally:
            if descriptor >= 0:
                os.close(descriptor)

    def _make_room(self, size: int, own: str, spared: Collection[str]) -> bool:
        """Evict until `size` bytes fit within the bound; return False, with nothing evicted, if they cannot.
        Call it under the folder's lock.

        own: name of the partial file that the bytes are for. spared: names that are not evicted.
        """
        entries = self._entries(own)
        excess = sum(entry.size for entry in entries) + size - self._most_bytes
        victims = [entry for entry in entries if entry.evictable and entry.content not in spared]
        if sum(entry.size for entry in victims) < excess:
            return False
        for entry in victims:
            if excess <= 0:
                break
            excess -= self._evict(entry)
        return True

    def _entries(self, own: str) -> list[_Entry]:
        """Return the files of the cache except `own` in the order of their eviction: those that this process
        wants come last, and otherwise the least recently used first."""
        entries = []
        wanted = self._wanted()
        for found in os.scandir(self.path):
            if found.name == own or not _NAME.fullmatch(found.name):
                continue
            with suppress(FileNotFoundError):
                status = found.stat(follow_symlinks=False)
                content = found.name.removesuffix(PARTIAL)
                active = content != found.name and _is_locked(found.path)
                # A running download will take the room of the whole file.
                size = int(content.rpartition("-")[2]) if active else status.st_size
                order = (content in wanted, max(status.st_mtime_ns, self._last_use(content)))
                entries.append(_Entry(found.name, content, size, not active, order))
        return sorted(entries, key=lambda entry: entry.order)

    def _last_use(self, content: str) -> int:
        """Return the time of a file's last use, as time.time_ns gives it; 0: never."""
        try:
            return os.stat(_used(self.path / content), follow_symlinks=False).st_mtime_ns
        except OSError:
            return 0

    def _evict(self, entry: _Entry) -> int:
        """Remove the file; return its bytes."""
        with suppress(FileNotFoundError):
            os.unlink(self.path / entry.name)
            self._on_eviction()
        with suppress(FileNotFoundError):
            os.unlink(_used(self.path / entry.content))
        return entry.size

    @contextmanager
    def _lock(self) -> Iterator[None]:
        """Exclude all other threads and processes while files are counted, evicted and claimed."""
        descriptor = os.open(self.path / LOCK_NAME, os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW, 0o644)
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX)
            yield
        finally:
            os.close(descriptor)


@dataclass(frozen=True)
class _Entry:
    """A file of the cache."""

    name: str
    content: str
    """The name without `.partial`."""
    size: int
    evictable: bool
    order: tuple[bool, int]
    """The entry with the smallest is evicted first."""


def _used(path: Path) -> Path:
    return path.with_name(path.name + USED)


def _note_use(path: Path) -> None:
    """Note that the file is used now. Its own times could say so, but would no longer show an alteration."""
    with suppress(OSError):  # a full disk may have no room for a name
        descriptor = os.open(_used(path), os.O_WRONLY | os.O_CREAT | os.O_NOFOLLOW, 0o644)
        try:
            os.utime(descriptor)
        finally:
            os.close(descriptor)


def _state(status: os.stat_result) -> tuple[int, ...]:
    return status.st_ino, *stamp_of(status)


def _try_lock(descriptor: int) -> bool:
    """Lock the open file and return True, unless another thread or process holds the lock."""
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    return True


def _is_locked(path: str) -> bool:
    descriptor = os.open(path, os.O_RDWR | os.O_NOFOLLOW)
    try:
        return not _try_lock(descriptor)
    finally:
        os.close(descriptor)
