"""Files of remote corpora on this machine's disk, in bounded room, shared by all its processes.

A file's name is its checksum and size, so that corpora that share shards share files. `NAME.partial` is a
file that is still arriving; whoever holds its lock is the one that downloads it, and a killed process'
partial file is gone on with by the next. What is read again and again stays: the file that has not been
used for the longest time makes room for a new one.

The time of the empty file `NAME.used` says when a file was used last. The file's own times are never touched:
with its size they tell one that this process has verified from one that something has altered since.
"""

from __future__ import annotations

import errno
import fcntl
import logging
import os
import re
import threading
import time
from collections import deque
from collections.abc import Collection, Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path

import xxhash

from llmtrain.corpus.config import CacheConfig
from llmtrain.corpus.tar_files import ShardError
from llmtrain.corpus.transport import Transport
from llmtrain.corpus.transport_source import UPLOAD_AGAIN
from llmtrain.errors import DataError, Problem
from llmtrain.files import at_home, checksum, disk_problem, is_disk_full, stamp_of, write_atomically
from llmtrain.urls import without_credentials

PARTIAL = ".partial"
USED = ".used"
LOCK_NAME = ".lock"
_NAME = re.compile(r"[0-9a-f]{32}-\d+(\.partial)?")
_POLL = 0.05
"""Seconds between looks whether other downloads have made room."""
_FULL_DISK_POLLS = 200
logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class RemoteFile:
    url: str
    size: int
    """Bytes."""
    xxh3_128: str
    """Checksum of its content, in hex."""

    @property
    def name(self) -> str:
        """Of its file in a cache."""
        return f"{self.xxh3_128}-{self.size}"

    @property
    def needs(self) -> str:
        """For messages about the disk."""
        return f"{self.size:,} bytes for {without_credentials(self.url)}"


@dataclass(frozen=True)
class Counters:
    """What a cache has done so far, in this process."""

    bytes: int = 0
    """Downloaded, what was thrown away included."""
    files: int = 0
    """Downloaded and verified."""
    retries: int = 0
    evictions: int = 0
    """Files removed to make room."""


class Cache:
    """Verified local files of remote ones. Safe from many threads, and from many processes at once."""

    def __init__(self, config: CacheConfig) -> None:
        self._config = config
        self._folder = at_home(config.dir)
        self._counts = dict.fromkeys(Counters.__dataclass_fields__, 0)
        self._counts_lock = threading.Lock()
        self._transport = Transport(
            config.retries,
            config.timeout,
            on_bytes=lambda count: self._count("bytes", count),
            on_retry=lambda: self._count("retries"),
        )
        self._verified: dict[str, tuple[int, ...]] = {}
        """Name → inode and stamp of the file that this process has verified."""
        self._queue: deque[RemoteFile] = deque()
        self._wanted: set[str] = set()
        """Names that `want` asked for and `open` has not taken yet: no read-ahead evicts them."""
        self._lock = threading.Lock()
        self._changes = 0
        self._turn = threading.Lock()
        self._threads: list[threading.Thread] = []
        self._closed = False

    def open(self, url: str, size: int, xxh3_128: str) -> int:
        """A local file with the content of `url`, downloaded if need be: open for reading, as a file
        descriptor, which the caller closes. It stays readable when it is evicted.

        Raises ShardError if the file can't be had or is not what its checksum says; DataError if the cache
        can't hold it or access is refused.
        """
        file = RemoteFile(url, size, xxh3_128)
        with self._taking(file):
            while True:
                try:
                    descriptor = self._claim(file)
                except _NoRoomError:
                    time.sleep(_POLL)
                    continue
                if descriptor is not None:
                    self._arrive(file, descriptor)
                    continue
                with suppress(FileNotFoundError):  # evicted in this moment
                    return os.open(self._folder / file.name, os.O_RDONLY | os.O_NOFOLLOW)

    def want(self, files: Sequence[RemoteFile]) -> None:
        """Read ahead: get `files` in this order in the background, in place of what is still queued.

        It never evicts one of them that is still to be used, and waits instead. What fails stays quiet
        until `open` asks for it.
        """
        with self._lock:
            self._queue = deque(dict.fromkeys(files))
            self._wanted = {file.name for file in self._queue}
            self._go_on()

    def read_small(self, url: str, at_most: int, xxh3_128: str | None = None) -> bytes:
        """The content of a small file (manifest, index, tokenizer), which is not kept.

        Raises DataError if it can't be had, has more than `at_most` bytes, or twice was not what the checksum
        says.
        """
        content = self._transport.read(url, at_most)
        if xxh3_128 is None or xxhash.xxh3_128_hexdigest(content) == xxh3_128:
            return content
        content = self._transport.read(url, at_most)
        if (found := xxhash.xxh3_128_hexdigest(content)) != xxh3_128:
            raise DataError(_altered(url, found, xxh3_128))
        return content

    def keep(self, content: bytes, suffix: str = "") -> Path:
        """A local file with this content, which is never evicted: for libraries that want a path.

        Raises DataError if the cache can't be written.
        """
        path = self._folder / f"kept-{xxhash.xxh3_128_hexdigest(content)}{suffix}"
        try:
            if not path.is_file() or path.read_bytes() != content:
                self._folder.mkdir(parents=True, exist_ok=True)
                write_atomically(path, content)
        except OSError as error:
            raise DataError(self._disk_problem(error, f"{len(content):,} bytes")) from error
        return path

    @property
    def counters(self) -> Counters:
        with self._counts_lock:
            return Counters(**self._counts)

    def close(self) -> None:
        """End what runs in the background; what has arrived of a file stays, to be gone on from."""
        with self._lock:
            self._closed = True
            threads = list(self._threads)
        self._transport.close()
        # One that waits for a byte is not waited for.
        deadline = time.monotonic() + 1.0
        for thread in threads:
            thread.join(max(0.0, deadline - time.monotonic()))

    @contextmanager
    def _taking(self, file: RemoteFile) -> Iterator[None]:
        """The file is used now: read-ahead leaves it alone, and may evict it afterwards."""
        with self._lock, suppress(ValueError):
            self._queue.remove(file)
        try:
            yield
        finally:
            with self._lock:
                self._wanted.discard(file.name)
                self._go_on()

    def _go_on(self) -> None:
        """Under the lock, after what may let read-ahead go on: see that its threads do."""
        self._changes += 1
        while not self._closed and len(self._threads) < min(self._config.downloads, len(self._queue)):
            thread = threading.Thread(target=self._read_ahead, name="shard download", daemon=True)
            self._threads.append(thread)
            thread.start()

    def _read_ahead(self) -> None:
        """What a thread does until nothing is left to read ahead, or no room for it."""
        while True:
            # One after the other, so that room that comes free goes to the file that is due first.
            with self._turn:
                with self._lock:
                    if self._closed or not self._queue:
                        self._threads.remove(threading.current_thread())
                        return
                    file, changes = self._queue[0], self._changes
                descriptor = None
                try:
                    descriptor = self._claim(file, ahead=True)
                except _NoRoomError:
                    if self._ends_after(changes):
                        return
                    continue
                except DataError as error:
                    logger.debug("read-ahead: %s", error)
                with self._lock, suppress(ValueError):
                    self._queue.remove(file)
            if descriptor is None:
                continue
            try:
                arrived = self._arrive(file, descriptor, ahead=True)
            except DataError as error:
                logger.debug("read-ahead: %s", error)
                continue
            if not arrived:
                with self._lock:
                    if file.name in self._wanted and file not in self._queue:
                        self._queue.appendleft(file)
                if self._ends_after(changes):
                    return

    def _ends_after(self, changes: int) -> bool:
        """Whether this thread ends for want of room: unless something has changed meanwhile. It does not
        look again by itself; `open` and `want` start another."""
        with self._lock:
            if self._changes != changes:
                return False
            self._threads.remove(threading.current_thread())
            return True

    def _claim(self, file: RemoteFile, ahead: bool = False) -> int | None:
        """What is to be downloaded into, open and locked, with its room made; None: the file is here.

        Raises _NoRoomError, ShardError, DataError.
        """
        where = without_credentials(file.url)
        if not _NAME.fullmatch(file.name):
            # It comes from a manifest that anybody may have written, and becomes part of a path.
            raise ShardError(Problem(where, f"xxh3_128 {file.xxh3_128!r}", "32 hex digits", UPLOAD_AGAIN))
        if file.size > self._config.bytes:
            allowed = f"at most data.cache.bytes={self._config.bytes:,} bytes"
            got = f"a file of {file.size:,} bytes"
            raise DataError(Problem(where, got, allowed, "raise data.cache.bytes"))
        with self._disk_errors(file):
            while not self._is_good(file):
                if (descriptor := self._begin(file, ahead)) is not None:
                    return descriptor
        return None

    def _is_good(self, file: RemoteFile) -> bool:
        """Whether the file is there and as it should be; an altered one is removed.

        A process reads each file once: a disk, too, may flip a byte.
        """
        path = self._folder / file.name
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

    def _begin(self, file: RemoteFile, ahead: bool) -> int | None:
        """The partial file, open and locked for this thread, with room made for the whole of it.

        None: another thread or process has downloaded the same, or has ended before it had. Raises
        _NoRoomError if other downloads take the room now or, for read-ahead, files that this process will
        use.
        """
        self._folder.mkdir(parents=True, exist_ok=True)
        partial = _partial(self._folder / file.name)
        descriptor = -1
        try:
            with self._folder_lock():
                if os.path.exists(self._folder / file.name):
                    return None
                descriptor = os.open(partial, os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW, 0o644)
                if _try_lock(descriptor):
                    if self._make_room(file.size, partial.name, self._spared() if ahead else ()):
                        mine, descriptor = descriptor, -1
                        return mine
                    if os.fstat(descriptor).st_size == 0:
                        partial.unlink()
                    raise _NoRoomError
            fcntl.flock(descriptor, fcntl.LOCK_EX)
            return None
        finally:
            if descriptor >= 0:
                os.close(descriptor)

    def _arrive(self, file: RemoteFile, descriptor: int, ahead: bool = False) -> bool:
        """Download into the partial file that `_claim` gave, give it its name and close the descriptor.

        False, for read-ahead alone: the disk is full. The file is not forced to the disk: whoever finds
        it after a crash of the machine verifies it.
        """
        path = self._folder / file.name
        partial = _partial(path)
        try:
            for _ in range(2):
                if not self._download(file, partial, ahead):
                    return False
                with self._disk_errors(file):
                    found = checksum(partial)
                    if found == file.xxh3_128:
                        with self._folder_lock():
                            os.replace(partial, path)
                        status = os.fstat(descriptor)
                        self._verified[file.name] = _state(status)
                        self._count("files")
                        return True
                    os.truncate(partial, 0)
            raise ShardError(_altered(file.url, found, file.xxh3_128))
        except DataError:
            if os.fstat(descriptor).st_size == 0:
                self._discard(file, partial)
            raise
        finally:
            os.close(descriptor)

    def _download(self, file: RemoteFile, partial: Path, ahead: bool) -> bool:
        """Complete the partial file. A full disk makes other files go, and is an error when none is left;
        False, for read-ahead alone, when none is left that this process doesn't want."""
        for _ in range(_FULL_DISK_POLLS):
            try:
                self._transport.download(file.url, partial, file.size)
                return True
            except OSError as error:
                full = error
            if not is_disk_full(full):
                break
            freed, others = self._free(file, ahead)
            if not freed:
                if ahead:
                    return False
                if not others:
                    break
                time.sleep(_POLL)
        self._discard(file, partial)
        raise DataError(self._disk_problem(full, file.needs)) from full

    def _spared(self) -> Collection[str]:
        with self._lock:
            return set(self._wanted)

    def _discard(self, file: RemoteFile, partial: Path) -> None:
        # Under the lock, so that nobody opens it before and locks it after.
        with self._disk_errors(file), self._folder_lock():
            partial.unlink(missing_ok=True)

    def _free(self, file: RemoteFile, ahead: bool) -> tuple[int, bool]:
        """Evict about as much as `file` needs from a disk that is full.

        Returns the bytes of what went, and whether other downloads run: one that ends may leave room.
        """
        with self._disk_errors(file), self._folder_lock():
            spared = self._spared() if ahead else ()
            entries = self._entries(_partial(self._folder / file.name).name)
            freed = 0
            for entry in entries:
                if freed < file.size and entry.evictable and entry.content not in spared:
                    freed += self._evict(entry)
            return freed, not all(entry.evictable for entry in entries)

    def _make_room(self, size: int, own: str, spared: Collection[str]) -> bool:
        """Under the folder's lock: evict until `size` bytes fit within the bound; False if they can't,
        and then nothing is evicted.

        own: the partial file that the bytes are for. spared: names that stay.
        """
        entries = self._entries(own)
        excess = sum(entry.size for entry in entries) + size - self._config.bytes
        victims = [entry for entry in entries if entry.evictable and entry.content not in spared]
        if sum(entry.size for entry in victims) < excess:
            return False
        for entry in victims:
            if excess <= 0:
                break
            excess -= self._evict(entry)
        return True

    def _entries(self, own: str) -> list[_Entry]:
        """Files of the cache except `own`, those first that go first: what this process still wants last,
        and otherwise in the order of their last use."""
        entries = []
        wanted = self._spared()
        for found in os.scandir(self._folder):
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
        """When a file was used last, as time.time_ns gives it; 0: never."""
        try:
            return os.stat(_used(self._folder / content), follow_symlinks=False).st_mtime_ns
        except OSError:
            return 0

    def _evict(self, entry: _Entry) -> int:
        with suppress(FileNotFoundError):
            os.unlink(self._folder / entry.name)
            self._count("evictions")
        with suppress(FileNotFoundError):
            os.unlink(_used(self._folder / entry.content))
        return entry.size

    @contextmanager
    def _folder_lock(self) -> Iterator[None]:
        """Alone among all threads and processes: what is there is counted and evicted, downloads begin."""
        descriptor = os.open(self._folder / LOCK_NAME, os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW, 0o644)
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX)
            yield
        finally:
            os.close(descriptor)

    @contextmanager
    def _disk_errors(self, file: RemoteFile) -> Iterator[None]:
        try:
            yield
        except OSError as error:
            raise DataError(self._disk_problem(error, file.needs)) from error

    def _disk_problem(self, error: OSError, needed: str) -> Problem:
        if error.errno in (errno.ENOLCK, errno.ENOSYS, errno.EOPNOTSUPP):
            got = f"a file system without locks ({error.strerror})"
            where = f"data.cache.dir={self._folder}"
            return Problem(where, got, "a disk of this machine", "choose another data.cache.dir")
        remedy = "make room, or choose another data.cache.dir or a smaller data.cache.bytes"
        return disk_problem(error, self._folder, key="data.cache.dir", allowed=needed, if_full=remedy)

    def _count(self, name: str, amount: int = 1) -> None:
        with self._counts_lock:
            self._counts[name] += amount


class _NoRoomError(Exception):
    pass


@dataclass(frozen=True)
class _Entry:
    """A file of the cache."""

    name: str
    content: str
    """The name without that it is partial."""
    size: int
    evictable: bool
    order: tuple[bool, int]
    """What has the smallest is evicted first."""


def _partial(path: Path) -> Path:
    return path.with_name(path.name + PARTIAL)


def _used(path: Path) -> Path:
    return path.with_name(path.name + USED)


def _note_use(path: Path) -> None:
    """The file is used now. Its own times would tell so too, but then not whether it was altered."""
    with suppress(OSError):  # of a disk without room for a name
        descriptor = os.open(_used(path), os.O_WRONLY | os.O_CREAT | os.O_NOFOLLOW, 0o644)
        try:
            os.utime(descriptor)
        finally:
            os.close(descriptor)


def _state(status: os.stat_result) -> tuple[int, ...]:
    return status.st_ino, *stamp_of(status)


def _try_lock(descriptor: int) -> bool:
    """Lock the open file unless another thread or process holds it."""
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


def _altered(url: str, found: str, expected: str) -> Problem:
    got = f"an altered file: its content has the checksum {found}"
    return Problem(without_credentials(url), got, f"xxh3_128 {expected}", UPLOAD_AGAIN)
