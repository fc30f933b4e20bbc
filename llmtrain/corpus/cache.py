"""Local copies of remote files, downloaded when they are needed or ahead of it.

The copies lie in a bounded folder of this machine's disk that all its processes share: cache_folder.py.
"""

from __future__ import annotations

import logging
import os
import threading
import time
from collections import deque
from collections.abc import Collection, Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path

import xxhash

from llmtrain.corpus.cache_folder import CacheFolder, NoRoomError, RemoteFile
from llmtrain.corpus.config import CacheConfig
from llmtrain.corpus.tar_files import TarFileError
from llmtrain.corpus.transport import Transport
from llmtrain.corpus.transport_source import UPLOAD_AGAIN
from llmtrain.errors import DataError, Problem
from llmtrain.files import is_disk_full, write_atomically
from llmtrain.urls import without_credentials

_POLL = 0.05
"""Seconds between looks whether other downloads have made room."""
_FULL_DISK_POLLS = 200
logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class Counters:
    """Counters of the cache in this process."""

    bytes: int = 0
    """Downloaded, discarded ones included."""
    files: int = 0
    """Downloaded and verified."""
    retries: int = 0
    evictions: int = 0
    """Files removed to make room."""


class Cache:
    """Verified local copies of remote files. Safe from many threads, and from many processes at once."""

    def __init__(self, config: CacheConfig) -> None:
        self._downloads = config.downloads
        self._counts = dict.fromkeys(Counters.__dataclass_fields__, 0)
        self._counts_lock = threading.Lock()
        self._folder = CacheFolder(
            config.dir,
            config.bytes,
            wanted=self._wanted_names,
            on_eviction=lambda: self._count("evictions"),
        )
        self._transport = Transport(
            config.retries,
            config.timeout,
            on_bytes=lambda count: self._count("bytes", count),
            on_retry=lambda: self._count("retries"),
        )
        self._queue: deque[RemoteFile] = deque()
        self._wanted: set[str] = set()
        """Names of files passed to `want` and not yet to `open`: no read-ahead evicts them."""
        self._lock = threading.Lock()
        self._changes = 0
        self._turn = threading.Lock()
        self._threads: list[threading.Thread] = []
        self._closed = False

    def open(self, url: str, size: int, xxh3_128: str) -> int:
        """Return a descriptor, open for reading, of a local file with the content of `url`, downloaded if
        needed. The caller closes it; it stays readable when the file is evicted.

        Raises TarFileError if the file cannot be had or does not match its checksum; DataError if the cache
        cannot hold it or access is refused.
        """
        file = RemoteFile(url, size, xxh3_128)
        with self._taking(file):
            while True:
                try:
                    descriptor = self._folder.claim(file)
                except NoRoomError:
                    time.sleep(_POLL)
                    continue
                if descriptor is not None:
                    self._download(file, descriptor)
                    continue
                with suppress(FileNotFoundError):  # evicted a moment ago
                    return self._folder.open(file)

    def want(self, files: Sequence[RemoteFile]) -> None:
        """Download `files` in this order in the background, in place of those still queued.

        Read-ahead never evicts one of them that has not been opened yet, and waits instead. Errors are
        raised only when `open` asks for the file.
        """
        with self._lock:
            self._queue = deque(dict.fromkeys(files))
            self._wanted = {file.name for file in self._queue}
            self._go_on()

    def read_small(self, url: str, at_most: int, xxh3_128: str | None = None) -> bytes:
        """Return the content of a small file (manifest, index, tokenizer), which is not cached.

        Raises DataError if it cannot be had, has more than `at_most` bytes, or twice does not match its
        checksum.
        """
        content = self._transport.read(url, at_most)
        if xxh3_128 is None or xxhash.xxh3_128_hexdigest(content) == xxh3_128:
            return content
        content = self._transport.read(url, at_most)
        if (found := xxhash.xxh3_128_hexdigest(content)) != xxh3_128:
            raise DataError(_altered(url, found, xxh3_128))
        return content

    def keep(self, content: bytes, suffix: str = "") -> Path:
        """Return a local file with this content, which is never evicted: for libraries that need a path.

        Raises DataError if the cache cannot be written.
        """
        path = self._folder.path / f"kept-{xxhash.xxh3_128_hexdigest(content)}{suffix}"
        try:
            if not path.is_file() or path.read_bytes() != content:
                path.parent.mkdir(parents=True, exist_ok=True)
                write_atomically(path, content)
        except OSError as error:
            raise DataError(self._folder.disk_problem(error, f"{len(content):,} bytes")) from error
        return path

    @property
    def counters(self) -> Counters:
        with self._counts_lock:
            return Counters(**self._counts)

    def close(self) -> None:
        """End the downloads in the background; partial files stay, to be resumed."""
        with self._lock:
            self._closed = True
            threads = list(self._threads)
        self._transport.close()
        # Bounded, since a thread may be waiting for a byte.
        deadline = time.monotonic() + 1.0
        for thread in threads:
            thread.join(max(0.0, deadline - time.monotonic()))

    @contextmanager
    def _taking(self, file: RemoteFile) -> Iterator[None]:
        """Take the file out of read-ahead while it is opened; read-ahead may evict it afterwards."""
        with self._lock, suppress(ValueError):
            self._queue.remove(file)
        try:
            yield
        finally:
            with self._lock:
                self._wanted.discard(file.name)
                self._go_on()

    def _wanted_names(self) -> Collection[str]:
        with self._lock:
            return set(self._wanted)

    def _go_on(self) -> None:
        """Start the threads of read-ahead that are missing, after a change that may let it go on. Call it
        under the lock."""
        self._changes += 1
        while not self._closed and len(self._threads) < min(self._downloads, len(self._queue)):
            thread = threading.Thread(target=self._read_ahead, name="read-ahead download", daemon=True)
            self._threads.append(thread)
            thread.start()

    def _read_ahead(self) -> None:
        """Run a thread of read-ahead until the queue is empty or there is no room for the next file."""
        while True:
            # One after the other, so that free room goes to the file that is due first.
            with self._turn:
                with self._lock:
                    if self._closed or not self._queue:
                        self._threads.remove(threading.current_thread())
                        return
                    file, changes = self._queue[0], self._changes
                descriptor = None
                try:
                    descriptor = self._folder.claim(file, spare_wanted=True)
                except NoRoomError:
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
                arrived = self._download(file, descriptor, ahead=True)
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
        """Return whether this thread ends for want of room: unless something has changed meanwhile. It does
        not poll; `open` and `want` start another thread."""
        with self._lock:
            if self._changes != changes:
                return False
            self._threads.remove(threading.current_thread())
            return True

    def _download(self, file: RemoteFile, descriptor: int, ahead: bool = False) -> bool:
        """Download the file whose claimed partial file is `descriptor`, verify it, and close the descriptor.

        Returns False only for read-ahead: the disk is full. Raises TarFileError for a file that twice does
        not match its checksum.
        """
        try:
            for _ in range(2):
                if not self._complete(file, ahead):
                    return False
                found = self._folder.install(file, descriptor)
                if found == file.xxh3_128:
                    self._count("files")
                    return True
            raise TarFileError(_altered(file.url, found, file.xxh3_128))
        except DataError:
            if os.fstat(descriptor).st_size == 0:
                self._folder.discard(file)
            raise
        finally:
            os.close(descriptor)

    def _complete(self, file: RemoteFile, ahead: bool) -> bool:
        """Download the rest of the partial file, evicting files when the disk is full.

        Returns False only for read-ahead: the disk is full of files that this process wants. Raises DataError
        when nothing is left to evict and no other download runs.
        """
        for _ in range(_FULL_DISK_POLLS):
            try:
                self._transport.download(file.url, self._folder.partial(file), file.size)
                return True
            except OSError as error:
                full = error
            if not is_disk_full(full):
                break
            freed, others = self._folder.free(file, spare_wanted=ahead)
            if not freed:
                if ahead:
                    return False
                if not others:
                    break
                time.sleep(_POLL)
        self._folder.discard(file)
        raise DataError(self._folder.disk_problem(full, file.needs)) from full

    def _count(self, name: str, amount: int = 1) -> None:
        with self._counts_lock:
            self._counts[name] += amount


def _altered(url: str, found: str, expected: str) -> Problem:
    got = f"an altered file: its content has the checksum {found}"
    return Problem(without_credentials(url), got, f"xxh3_128 {expected}", UPLOAD_AGAIN)
