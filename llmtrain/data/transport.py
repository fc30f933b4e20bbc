"""How bytes come from elsewhere: http and https by urllib3, s3 by pyarrow, every other scheme by fsspec.

A download goes on from where its partial file ends, after a cut connection as after a killed process.
What may pass (a cut, a time limit, a busy server) is tried again with growing waits; what stays (no such
file, no access) is an error at once. Messages show a URL without its credentials.
"""

from __future__ import annotations

import io
import os
import random
import re
import threading
from collections.abc import Callable, Iterator
from netrc import NetrcParseError, netrc
from pathlib import Path
from typing import IO, Any, Protocol
from urllib.parse import quote, unquote, urlsplit, urlunsplit
from urllib.request import getproxies, proxy_bypass

from llmtrain.data.shards import ShardError
from llmtrain.errors import DataError, Problem
from llmtrain.urls import without_credentials

HTTP_CHUNK_BYTES = 1 << 18
FILESYSTEM_CHUNK_BYTES = 8 << 20
"""One request each, where the store is asked for ranges."""
FIRST_WAIT = 0.25
"""Seconds before the first attempt after a failure; each further wait is twice as long."""
LONGEST_WAIT = 60.0
"""Seconds; a server's Retry-After is heeded up to five times as long."""
MOST_CONNECTIONS = 64
MOST_REDIRECTS = 5
UPLOAD_AGAIN = "upload the corpus again"
_SCHEME = re.compile(r"[a-zA-Z][a-zA-Z0-9+.-]*(::[a-zA-Z][a-zA-Z0-9+.-]*)*://")
_PASSING_STATUSES = (408, 425, 429)
_S3_REFUSES = (
    "ACCESS_DENIED",
    "EXPIRED_TOKEN",
    "INVALID_ACCESS_KEY_ID",
    "INVALID_CLIENT_TOKEN_ID",
    "MISSING_AUTHENTICATION_TOKEN",
    "REQUEST_EXPIRED",
    "SIGNATURE_DOES_NOT_MATCH",
    "UNRECOGNIZED_CLIENT",
)


def is_remote(path: str) -> bool:
    """Whether `path` is a URL (`scheme://…`); `package:NAME/path` is not."""
    return _SCHEME.match(path) is not None


def join(root: str, name: str) -> str:
    """The URL of file `name` (a path with /) below `root`; the query of a web address stays at its end."""
    if not _is_http(root):
        return f"{root.rstrip('/')}/{name}"
    parts = urlsplit(root)
    return urlunsplit(parts._replace(path=f"{parts.path.rstrip('/')}/{quote(name)}"))


class Transport:
    """Reads and downloads by URL. Safe from several threads.

    retries: attempts after the first that may fail in a row without a new byte.
    timeout: seconds without a byte after which an attempt has failed.
    on_bytes: called with the number of bytes of each piece that arrives; on_retry: before each wait.
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

    def read(self, url: str) -> bytes:
        """The whole of a small file. Raises DataError if it can't be had."""
        content = io.BytesIO()
        try:
            self._fetch(url, content, None)
        except ShardError as error:
            # A manifest or an index is no shard that a run could do without.
            raise DataError(error.problems) from error
        return content.getvalue()

    def describe(self, url: str) -> tuple[int | None, str]:
        """Bytes of the file, if they are told, and what tells its state from a later one; empty: not known.

        Raises as `download`.
        """
        source = self._open(url)
        failures = 0
        while True:
            self._check_open(url)
            try:
                return source.describe()
            except _PassingError as again:
                failures += 1
                self._wait(url, failures, again)

    def download(self, url: str, partial: Path, size: int) -> None:
        """Append to `partial` from where it ends until it holds the `size` bytes of the file at `url`.

        Raises ShardError for a file that is missing, of another size, or can't be had after all retries;
        DataError where access or a package is missing; OSError if `partial` can't be written. What has
        arrived stays in `partial`.
        """
        with open(partial, "ab") as file:
            if file.tell() > size:
                file.truncate(0)
                file.seek(0)
            if file.tell() < size:
                self._fetch(url, file, size)

    def close(self) -> None:
        """End the waits and downloads of all threads; they raise DataError."""
        self._closed.set()
        with self._lock:
            for pool in self._pools.values():
                pool.clear()

    def _fetch(self, url: str, file: IO[bytes], size: int | None) -> None:
        """Append the bytes of `url` to `file`, which holds what came before."""
        source = self._open(url)
        offset = furthest = file.tell()
        failures = 0
        while True:
            self._check_open(url)
            try:
                for place, chunk in source.chunks(offset, size):
                    self._check_open(url)
                    self._on_bytes(len(chunk))
                    if place != offset:
                        file.truncate(place)
                        file.seek(place)
                    file.write(chunk)
                    offset = place + len(chunk)
                return
            except _PassingError as again:
                failures = 1 if offset > furthest else failures + 1
                furthest = max(furthest, offset)
                self._wait(url, failures, again)
                # Without a size and a version, bytes of two states of a file could be joined.
                if again.restart or (size is None and not source.version):
                    file.truncate(0)
                    file.seek(0)
                    offset = 0

    def _wait(self, url: str, failures: int, again: _PassingError) -> None:
        """Wait before the next attempt. Raises ShardError after too many failures in a row."""
        if failures > self._retries:
            attempts = f"{self._retries + 1} attempts" if self._retries else "one attempt"
            got = f"no answer that can be used in {attempts} ({again.reason})"
            remedy = "see that the server is well, or raise data.cache.retries and data.cache.timeout"
            raise ShardError(Problem(without_credentials(url), got, "", remedy)) from again
        self._on_retry()
        wait = min(LONGEST_WAIT, FIRST_WAIT * 2 ** (failures - 1)) * random.uniform(0.5, 1.0)
        self._closed.wait(max(wait, min(again.wait, 5 * LONGEST_WAIT)))

    def _check_open(self, url: str) -> None:
        if self._closed.is_set():
            raise DataError(
                Problem(without_credentials(url), "the end of the run before the end of the file")
            )

    def _open(self, url: str) -> _Source:
        if _is_http(url):
            return _HttpFile(url, self._pool(urlsplit(url)), self._timeout)
        if url.startswith(("s3://", "s3a://")):
            return _S3File(url, self._timeout)
        return _FilesystemFile(url)

    def _pool(self, parts: Any) -> Any:
        """urllib3's pools of connections: direct ones, or of the proxy that the environment names."""
        import urllib3

        proxy = getproxies().get(parts.scheme.lower(), "")
        if not proxy or proxy_bypass(parts.hostname or ""):
            proxy = ""
        with self._lock:
            if proxy not in self._pools:
                # urllib3 logs a warning when connections outnumber this; they are made on demand.
                options: dict[str, Any] = {"maxsize": MOST_CONNECTIONS}
                self._pools[proxy] = (
                    urllib3.ProxyManager(proxy, **options) if proxy else urllib3.PoolManager(**options)
                )
            return self._pools[proxy]


class _PassingError(Exception):
    """A failure that may pass.

    wait: seconds that the server asks for. restart: what has arrived can't be gone on from.
    """

    def __init__(self, reason: str, wait: float = 0.0, restart: bool = False) -> None:
        super().__init__(reason)
        self.reason = reason
        self.wait = wait
        self.restart = restart


class _Source(Protocol):
    """A remote file."""

    version: str
    """What tells a changed file from the one that was first seen; empty: not known."""

    def describe(self) -> tuple[int | None, str]:
        """Size and version. Raises as `chunks`."""

    def chunks(self, offset: int, size: int | None) -> Iterator[tuple[int, bytes]]:
        """Bytes with their place in the file, from `offset` or an earlier place to the file's end.

        size: bytes that the file must have. Raises _PassingError, ShardError, DataError.
        """


class _HttpFile:
    def __init__(self, url: str, pool: Any, timeout: float) -> None:
        from urllib3 import Retry, Timeout
        from urllib3.util import make_headers

        parts = urlsplit(url)
        user, _, host = parts.netloc.rpartition("@")
        credentials = unquote(user) or _netrc_credentials(parts.hostname or "")
        self._url = url
        self._address = urlunsplit(parts._replace(netloc=host))
        self._pool = pool
        self._headers = {"Accept-Encoding": "identity"}
        if credentials:
            self._headers |= make_headers(basic_auth=credentials)
        self._seconds = timeout
        # Waiting and trying again is done above.
        retries = Retry(
            connect=0, read=0, status=0, other=0, redirect=MOST_REDIRECTS, respect_retry_after_header=False
        )
        self._options = {
            "preload_content": False,
            "timeout": Timeout(connect=timeout, read=timeout),
            "retries": retries,
        }
        self.version = ""

    def describe(self) -> tuple[int | None, str]:
        # GET, because a signed URL is signed for it; the body stays unread.
        response = self._request(0)
        try:
            return self._answer(response, 0)[1], self.version
        finally:
            response.close()

    def _request(self, offset: int) -> Any:
        from urllib3.exceptions import HTTPError

        headers = dict(self._headers)
        if offset:
            headers["Range"] = f"bytes={offset}-"
            if self.version:
                headers["If-Range"] = self.version
        try:
            return self._pool.request("GET", self._address, headers=headers, **self._options)
        except HTTPError as error:
            raise self._failure(error) from error

    def chunks(self, offset: int, size: int | None) -> Iterator[tuple[int, bytes]]:
        from urllib3.exceptions import HTTPError

        response = self._request(offset)
        try:
            place, total = self._answer(response, offset)
            if size is not None and total is not None and total != size:
                raise ShardError(_wrong_size(self._url, total, size))
            end = total if size is None else size
            while chunk := response.read1(HTTP_CHUNK_BYTES, decode_content=False):
                if end is not None and place + len(chunk) > end:
                    raise ShardError(_wrong_size(self._url, place + len(chunk), end))
                yield place, chunk
                place += len(chunk)
            if end is not None and place < end:
                raise _PassingError(f"the answer ended after {place:,} of {end:,} bytes")
        except HTTPError as error:
            raise self._failure(error) from error
        finally:
            response.close()

    def _answer(self, response: Any, offset: int) -> tuple[int, int | None]:
        """Where the body begins in the file, and how long the file is, if the server says so."""
        status = response.status
        if status in (200, 206):
            version = _version(response.headers)
            changed, self.version = self.version not in ("", version), version
            if status == 200:
                length = response.headers.get("Content-Length", "")
                return 0, int(length) if length.isdigit() else None
            found = re.match(r"bytes (\d+)-\d+/(\d+|\*)", response.headers.get("Content-Range", ""))
            if changed or not found or int(found[1]) != offset:
                raise _PassingError("another range than the one asked for", restart=True)
            return offset, None if found[2] == "*" else int(found[2])
        where = without_credentials(self._url)
        if status == 416:
            raise _PassingError(f"HTTP 416: the file ends before byte {offset:,}", restart=True)
        if status in (404, 410):
            raise ShardError(
                Problem(where, f"no such file (HTTP {status})", "a file of the corpus", UPLOAD_AGAIN)
            )
        if status in (401, 403, 407):
            remedy = "give credentials that may read it, in ~/.netrc (or the file that NETRC names)"
            raise DataError(Problem(where, f"access refused (HTTP {status})", "", remedy))
        if status in _PASSING_STATUSES or status >= 500:
            raise _PassingError(f"HTTP {status}", wait=_retry_after(response.headers.get("Retry-After")))
        raise DataError(Problem(where, f"HTTP {status}", "200 or 206", "check the URL"))

    def _failure(self, error: Exception) -> Exception:
        """What urllib3's error is to us; its own text holds the URL."""
        from urllib3 import exceptions

        cause = getattr(error, "reason", None)
        cause = cause if isinstance(cause, Exception) else error
        where, text = without_credentials(self._url), _scrubbed(str(cause), self._url)
        is_refused = isinstance(cause, exceptions.NewConnectionError)  # which is a TimeoutError by descent
        if isinstance(cause, exceptions.TimeoutError) and not is_refused:
            return _PassingError(f"no byte for {self._seconds:g} s")
        if isinstance(cause, exceptions.SSLError):
            remedy = "check the server's certificate (SSL_CERT_FILE names the authorities that are trusted)"
            return DataError(Problem(where, text, "", remedy))
        if isinstance(cause, (exceptions.LocationValueError, exceptions.ResponseError)):
            got = _scrubbed(str(cause), self._url)
            return DataError(
                Problem(without_credentials(self._url), got, "the URL of a file", "check the URL")
            )
        return _PassingError(f"{type(cause).__name__}: {text}")


class _FilesystemFile:
    """A file of a store that fsspec knows."""

    def __init__(self, url: str) -> None:
        self._url = url
        self.version = ""

    def describe(self) -> tuple[int | None, str]:
        try:
            size, version, _ = self._look()
        except Exception as error:
            raise self._failure(error) from error
        return size, version

    def chunks(self, offset: int, size: int | None) -> Iterator[tuple[int, bytes]]:
        place = offset
        try:
            total, version, open_file = self._look()
            changed, self.version = self.version not in ("", version), version
            with open_file() as file:
                if size is not None and total is not None and total != size:
                    raise ShardError(_wrong_size(self._url, total, size))
                end = total if size is None else size
                if changed and offset:
                    raise _PassingError("another state of the file than before", restart=True)
                file.seek(place)
                while end is None or place < end:
                    # No further than the end: a store refuses a range behind it.
                    left = FILESYSTEM_CHUNK_BYTES if end is None else end - place
                    chunk = file.read(min(FILESYSTEM_CHUNK_BYTES, left))
                    if not chunk:
                        break
                    yield place, chunk
                    place += len(chunk)
        except (_PassingError, DataError):
            raise
        except Exception as error:
            # Each store has errors of its own; most descend from Exception alone.
            raise self._failure(error) from error
        if end is not None and place < end:
            raise _PassingError(f"the file ended after {place:,} of {end:,} bytes")

    def _look(self) -> tuple[int | None, str, Callable[[], Any]]:
        """The file's size, what tells its state from another, and what opens it."""
        import fsspec

        system, path = fsspec.url_to_fs(self._url)
        # A listing from before a file came, or changed, would hide that it did.
        system.invalidate_cache()
        info = system.info(path)
        if info.get("type") == "directory":
            raise IsADirectoryError("a folder")
        return info.get("size"), str(info), lambda: system.open(path, "rb", cache_type="none")

    def _failure(self, error: Exception) -> Exception:
        where, text = without_credentials(self._url), _scrubbed(str(error), self._url)
        if isinstance(error, (FileNotFoundError, NotADirectoryError, IsADirectoryError)):
            return ShardError(_missing(self._url, text))
        if isinstance(error, PermissionError):
            remedy = "give credentials that may read it, as the store's own tools take them"
            return DataError(Problem(where, f"access refused ({text})", "", remedy))
        if isinstance(error, ImportError):
            got = f"a scheme whose package is not installed ({text})"
            return DataError(Problem(where, got, "", "install that package"))
        if isinstance(error, ValueError) and "Protocol not known" in text:
            known = "http, https, s3, gs, az and what else fsspec knows"
            return DataError(Problem(where, "an unknown scheme", known, "check the URL"))
        return _PassingError(f"{type(error).__name__}: {text}")


class _S3File(_FilesystemFile):
    """A file in S3, or in what speaks its protocol; settings are found where Amazon's own tools look."""

    def __init__(self, url: str, timeout: float) -> None:
        super().__init__(url)
        self._timeout = timeout

    def _look(self) -> tuple[int | None, str, Callable[[], Any]]:
        path = self._url.partition("://")[2]
        if not all(path.partition("/")[::2]):
            raise IsADirectoryError("a bucket")
        file = self._store().open_input_file(path)
        about = file.metadata()
        version = about.get("ETag", b"") or about.get("Last-Modified", b"")
        return file.size(), version.decode(), lambda: file

    def _store(self) -> Any:
        from pyarrow.fs import AwsStandardS3RetryStrategy, S3FileSystem

        endpoint = os.environ.get("AWS_ENDPOINT_URL_S3") or os.environ.get("AWS_ENDPOINT_URL")
        proxy = getproxies().get("http" if (endpoint or "").startswith("http:") else "https")
        if proxy and proxy_bypass(urlsplit(endpoint or "https://amazonaws.com").hostname or ""):
            proxy = None
        return S3FileSystem(
            endpoint_override=endpoint,
            proxy_options=proxy,
            connect_timeout=self._timeout,
            request_timeout=self._timeout,
            # Waiting and trying again is done above, alike for every store.
            retry_strategy=AwsStandardS3RetryStrategy(max_attempts=1),
        )

    def _failure(self, error: Exception) -> Exception:
        """What pyarrow's error is to us: beside OSError, Amazon's own code stands in its text."""
        where, text = without_credentials(self._url), _scrubbed(" ".join(str(error).split()), self._url)
        if any(code in text for code in _S3_REFUSES):
            remedy = "give credentials that may read it, as Amazon's own tools take them (AWS_PROFILE, say)"
            return DataError(Problem(where, f"access refused ({text})", "", remedy))
        if "HTTP status 301" in text or "HTTP status 400" in text:
            remedy = "check the URL, and give the region of the bucket in AWS_REGION"
            return DataError(Problem(where, text, "", remedy))
        if isinstance(error, ImportError):
            got = f"a pyarrow that was built without S3 ({text})"
            return DataError(Problem(where, got, "", "pip install pyarrow"))
        return super()._failure(error)


def _is_http(url: str) -> bool:
    return url.lower().startswith(("http://", "https://"))


def _netrc_credentials(host: str) -> str:
    """`user:password` of the user's netrc file, where secrets are kept out of a run's config; or nothing."""
    try:
        found = netrc(os.environ.get("NETRC") or Path("~/.netrc").expanduser()).authenticators(host)
    except (OSError, NetrcParseError):
        return ""
    return f"{found[0]}:{found[2]}" if found else ""


def _version(headers: Any) -> str:
    """What If-Range takes: a strong ETag, or the time of the last change."""
    etag = headers.get("ETag", "")
    return etag if etag.startswith('"') else headers.get("Last-Modified", "")


def _retry_after(value: str | None) -> float:
    """Seconds that the header asks for, as a number or a date; 0 if it says nothing that can be used."""
    from urllib3 import Retry
    from urllib3.exceptions import InvalidHeader

    try:
        return Retry().parse_retry_after(value) if value else 0.0
    except InvalidHeader:
        return 0.0


def _scrubbed(text: str, url: str) -> str:
    """`text` of a library, without what `url` keeps secret."""
    parts = urlsplit(url)
    user = parts.netloc.rpartition("@")[0]
    text = text.replace(url, without_credentials(url))
    for secret in (user, parts.query if _is_http(url) else "", unquote(user.partition(":")[2])):
        if secret:
            text = text.replace(secret, "…")
    return text


def _missing(url: str, reason: str) -> Problem:
    return Problem(without_credentials(url), f"no such file ({reason})", "a file of the corpus", UPLOAD_AGAIN)


def _wrong_size(url: str, size: int, expected: int) -> Problem:
    kind = "a truncated file" if size < expected else "a file that is too long,"
    got = f"{kind} of {size} bytes" if size < expected else f"{kind} {size} bytes or more"
    return Problem(without_credentials(url), got, f"{expected} bytes", UPLOAD_AGAIN)
