"""Download by URL: http and https by urllib3, s3 by pyarrow, every other scheme by fsspec.

A download resumes at the end of its partial file, after a broken connection and after a killed process.
Temporary failures (a broken connection, a timeout, a busy server) are retried with growing waits; permanent
ones (no such file, no access) are errors at once. Messages show a URL without its credentials.
"""

from __future__ import annotations

import io
import logging
import random
import re
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import IO, Any
from urllib.parse import SplitResult, quote, urlsplit, urlunsplit
from urllib.request import getproxies, proxy_bypass

from llmtrain.corpus.tar_files import TarFileError
from llmtrain.corpus.transport_http import LEAST_RATE, HttpFile, pool_manager
from llmtrain.corpus.transport_source import PassingError, Source, is_http
from llmtrain.corpus.transport_stores import S3File, StoreFile
from llmtrain.errors import DataError, Problem, printable
from llmtrain.files import no_follow_opener
from llmtrain.urls import without_credentials

FIRST_WAIT = 0.25
"""Seconds before the first attempt after a failure; each further wait is twice as long."""
TOLD_WAIT = 5.0
"""Seconds; longer waits are logged."""
LONGEST_WAIT = 60.0
"""Seconds; a server's Retry-After is followed up to five times as long."""
MOST_CONNECTIONS = 64
logger = logging.getLogger(__name__)
_SCHEME = re.compile(r"[a-zA-Z][a-zA-Z0-9+.-]*(::[a-zA-Z][a-zA-Z0-9+.-]*)*://")


def is_remote(path: str) -> bool:
    """Return whether `path` is a URL (`scheme://…`); `package:NAME/path` is not."""
    return _SCHEME.match(path) is not None


def join(root: str, name: str) -> str:
    """Return the URL of the file `name`, a path with /, below `root`; a query string of `root` stays at the
    end."""
    if not is_http(root):
        return f"{root.rstrip('/')}/{name}"
    parts = _parts(root)
    return urlunsplit(parts._replace(path=f"{parts.path.rstrip('/')}/{quote(name)}"))


def _parts(url: str) -> SplitResult:
    """Split a URL. Raises DataError for anything else."""
    try:
        parts = urlsplit(url)
        _ = is_http(url) and parts.port
    except ValueError:  # its message may contain a part of a password
        raise DataError(Problem(without_credentials(url), "no URL", "scheme://host/path")) from None
    return parts


def next_wait(failures: int) -> float:
    """Return the seconds to wait after so many failures in a row."""
    # Jitter, so that clients that failed together do not retry together; not a secret.
    jitter = random.uniform(0.5, 1.0)  # noqa: S311
    return min(LONGEST_WAIT, FIRST_WAIT * 2 ** (failures - 1)) * jitter


class Transport:
    """Reads and downloads by URL. Safe from several threads.

    retries: consecutive failures without a new byte that are retried.
    timeout: seconds without bytes, or with hardly any, after which an attempt fails.
    on_bytes: called with the number of bytes of each received chunk. on_retry: called before each wait.
    """

    def __init__(
        self,
        retries: int = 8,
        timeout: float = 30.0,
        on_bytes: Callable[[int], None] = lambda count: None,
        on_retry: Callable[[], None] = lambda: None,
    ) -> None:
        self._retries = retries
        self._timeout = timeout
        self._on_bytes = on_bytes
        self._on_retry = on_retry
        self._pools: dict[str, Any] = {}
        self._lock = threading.Lock()
        self._closed = threading.Event()

    def read(self, url: str, at_most: int) -> bytes:
        """Return the content of a small file. Raises DataError if it cannot be had, or has more than
        `at_most` bytes."""
        content = io.BytesIO()
        try:
            self._fetch(url, content, None, at_most)
        except TarFileError as error:
            # Unlike a tar file, a manifest or an index cannot be skipped.
            raise DataError(error.problems) from error
        return content.getvalue()

    def describe(self, url: str) -> tuple[int | None, str]:
        """Return the size of the file in bytes, if known, and its version; empty: not known.

        Raises as `download`.
        """
        source = self._open(url)
        failures = 0
        while True:
            self._check_open(url)
            try:
                return source.describe()
            except PassingError as again:
                failures += 1
                self._wait(url, failures, again)

    def download(self, url: str, partial: Path, size: int) -> None:
        """Append to `partial` until it holds all `size` bytes of the file at `url`.

        Raises TarFileError for a file that is missing, of another size, or cannot be had after all retries;
        DataError for missing access or a missing package; OSError if `partial` cannot be written. `partial`
        keeps the bytes received so far.
        """
        with open(partial, "ab", opener=no_follow_opener) as file:
            if file.tell() > size:
                file.truncate(0)
                file.seek(0)
            if file.tell() < size:
                self._fetch(url, file, size, size)

    def close(self) -> None:
        """End the waits and downloads of all threads, which then raise DataError."""
        self._closed.set()
        with self._lock:
            for pool in self._pools.values():
                pool.clear()

    def _fetch(self, url: str, file: IO[bytes], size: int | None, at_most: int) -> None:
        """Append the rest of `url` to `file`, which holds the bytes received before."""
        source = self._open(url)
        offset = furthest = file.tell()
        failures = 0
        while True:
            self._check_open(url)
            began = time.monotonic()
            try:
                for position, chunk in source.chunks(offset, size, at_most):
                    self._check_open(url)
                    self._on_bytes(len(chunk))
                    if position != offset:
                        file.truncate(position)
                        file.seek(position)
                    file.write(chunk)
                    offset = position + len(chunk)
                return
            except PassingError as again:
                # An attempt counts as progress only at a least rate: one byte each would go on for ever.
                comes = offset - furthest >= LEAST_RATE * (time.monotonic() - began)
                failures = 1 if comes and offset > furthest else failures + 1
                furthest = max(furthest, offset)
                self._wait(url, failures, again)
                # Without size and version the chunks could come from two versions of the file.
                if again.restart or (size is None and not source.version):
                    file.truncate(0)
                    file.seek(0)
                    offset = 0

    def _wait(self, url: str, failures: int, again: PassingError) -> None:
        """Wait before the next attempt. Raises TarFileError after too many consecutive failures."""
        if failures > self._retries:
            attempts = f"{self._retries + 1} attempts" if self._retries else "one attempt"
            got = f"no answer that can be used in {attempts} ({again.reason})"
            remedy = "check the server, or raise data.cache.retries and data.cache.timeout"
            raise TarFileError(Problem(without_credentials(url), got, "", remedy)) from again
        self._on_retry()
        wait = max(next_wait(failures), min(again.wait, 5 * LONGEST_WAIT))
        if wait >= TOLD_WAIT:
            where, left = without_credentials(url), self._retries + 1 - failures
            told = f"{where}: {printable(again.reason)}: trying again in {wait:.0f} s, {left} times at most"
            logger.warning("%s", told)
        self._closed.wait(wait)

    def _check_open(self, url: str) -> None:
        if self._closed.is_set():
            raise DataError(
                Problem(without_credentials(url), "the end of the run before the end of the file")
            )

    def _open(self, url: str) -> Source:
        parts = _parts(url)
        if is_http(url):
            return HttpFile(url, self._pool(parts), self._timeout)
        if url.startswith(("s3://", "s3a://")):
            return S3File(url, self._timeout)
        return StoreFile(url)

    def _pool(self, parts: Any) -> Any:
        """Return urllib3's connection pools, direct ones or those of the proxy that the environment names."""
        proxy = getproxies().get(parts.scheme.lower(), "")
        if not proxy or proxy_bypass(parts.hostname or ""):
            proxy = ""
        with self._lock:
            if proxy not in self._pools:
                # urllib3 logs a warning when connections outnumber this; they are made on demand.
                self._pools[proxy] = pool_manager(proxy, MOST_CONNECTIONS)
            return self._pools[proxy]
