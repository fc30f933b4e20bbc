"""Files of web servers, read by urllib3."""

from __future__ import annotations

import os
import re
import socket
import time
from collections.abc import Iterator, Mapping
from netrc import NetrcParseError, netrc
from pathlib import Path
from typing import Any
from urllib.parse import unquote, urljoin, urlsplit, urlunsplit

from llmtrain.config import show
from llmtrain.corpus.tar_files import TarFileError
from llmtrain.corpus.transport_source import UPLOAD_AGAIN, PassingError, refuse_longer, scrubbed, wrong_size
from llmtrain.errors import DataError, Problem
from llmtrain.urls import without_credentials

HTTP_CHUNK_BYTES = 1 << 18
LEAST_RATE = 1024
"""Bytes a second; an attempt that is slower for the length of the timeout fails: a server that sends a byte
now and then would hold a reader for ever."""
HEADER_BYTES = 1 << 20
"""Most bytes of all headers of a response, and of the framing of its chunks during one read."""
FEW_PIECES, SMALL_PIECE = 4096, 64
"""A response of more chunks than the first number, of fewer bytes than the second on average, is refused."""
MOST_REDIRECTS = 5
_REDIRECTS = (301, 302, 303, 307, 308)
_LENGTH = re.compile(r"[0-9]{1,18}")
_RANGE = re.compile(r"bytes ([0-9]{1,18})-[0-9]{1,18}/([0-9]{1,18}|\*)")
_PASSING_STATUSES = (408, 425, 429)


class HttpFile:
    """A file of a web server; a `Source`."""

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
        # The transport retries, and `_request` follows redirects: urllib3 would read their bodies without
        # bound.
        retries = Retry(connect=0, read=0, status=0, other=0, redirect=0, respect_retry_after_header=False)
        self._options = {
            "preload_content": False,
            "timeout": Timeout(connect=timeout, read=timeout),
            "retries": retries,
            "redirect": False,
        }
        self.version = ""

    def describe(self) -> tuple[int | None, str]:
        # GET, not HEAD: a signed URL is signed for GET. The body is not read.
        response = self._request(0)
        try:
            return self._answer(response, 0)[1], self.version
        finally:
            response.close()

    def _request(self, offset: int) -> Any:
        """Return the response for the bytes from `offset`, after redirects. Credentials go to the first host
        only."""
        headers = dict(self._headers)
        if offset:
            headers["Range"] = f"bytes={offset}-"
            if self.version:
                headers["If-Range"] = self.version
        address = self._address
        for _ in range(MOST_REDIRECTS + 1):
            response = self._ask(address, headers)
            if response.status not in _REDIRECTS:
                return response
            response.close()
            before, address = address, self._redirected(address, response.headers.get("Location", ""))
            if urlsplit(before)[:2] != urlsplit(address)[:2]:
                headers.pop("authorization", None)
        raise DataError(Problem(without_credentials(self._url), "too many redirects", f"{MOST_REDIRECTS}"))

    def _ask(self, address: str, headers: Mapping[str, str]) -> Any:
        from urllib3.exceptions import HTTPError

        try:
            return self._pool.request("GET", address, headers=headers, **self._options)
        except HTTPError as error:
            raise self._failure(error) from error

    def _redirected(self, address: str, location: str) -> str:
        """Return the address of a redirect. Raises DataError for anything but a web address."""
        try:
            parts = urlsplit(urljoin(address, location))
            is_web = parts.scheme in ("http", "https") and bool(parts.hostname) and (parts.port or 1) > 0
        except ValueError:
            is_web = False
        if not is_web:
            got = f"a redirect to {show(location)}"
            raise DataError(Problem(without_credentials(self._url), got, "a web address", "check the URL"))
        return urlunsplit(parts._replace(netloc=parts.netloc.rpartition("@")[2]))

    def chunks(self, offset: int, size: int | None, at_most: int) -> Iterator[tuple[int, bytes]]:
        from urllib3.exceptions import HTTPError

        response = self._request(offset)
        try:
            position, total = self._answer(response, offset)
            if size is not None and total is not None and total != size:
                raise TarFileError(wrong_size(self._url, total, size))
            end = total if size is None else size
            if size is None:
                refuse_longer(self._url, end, at_most)
            pieces, begin = 0, position
            while chunk := self._read(response):
                pieces += 1
                if pieces > FEW_PIECES and position - begin < pieces * SMALL_PIECE:
                    got = f"an answer in {pieces:,} pieces of {(position - begin) / pieces:.0f} bytes"
                    raise DataError(Problem(without_credentials(self._url), got, "larger pieces"))
                if end is not None and position + len(chunk) > end:
                    raise TarFileError(wrong_size(self._url, position + len(chunk), end))
                refuse_longer(self._url, position + len(chunk), at_most)
                yield position, chunk
                position += len(chunk)
            if end is not None and position < end:
                raise PassingError(f"the answer ended after {position:,} of {end:,} bytes")
        except HTTPError as error:
            raise self._failure(error) from error
        finally:
            response.close()

    def _read(self, response: Any) -> bytes:
        # Besides the chunk, urllib3 reads the framing of chunks.
        response.meter.allow(4 * HTTP_CHUNK_BYTES + HEADER_BYTES)
        chunk: bytes = response.read1(HTTP_CHUNK_BYTES, decode_content=False)
        return chunk

    def _answer(self, response: Any, offset: int) -> tuple[int, int | None]:
        """Return the position of the body in the file, and the size of the file if the server says it."""
        status = response.status
        if status in (200, 206):
            version = _version(response.headers)
            changed, self.version = self.version not in ("", version), version
            if status == 200:
                length = response.headers.get("Content-Length", "")
                return 0, int(length) if _LENGTH.fullmatch(length) else None
            found = _RANGE.match(response.headers.get("Content-Range", ""))
            if changed or not found or int(found[1]) != offset:
                raise PassingError("another range than the one asked for", restart=True)
            return offset, None if found[2] == "*" else int(found[2])
        where = without_credentials(self._url)
        if status == 416:
            raise PassingError(f"HTTP 416: the file ends before byte {offset:,}", restart=True)
        if status in (404, 410):
            raise TarFileError(
                Problem(where, f"no such file (HTTP {status})", "a file of the corpus", UPLOAD_AGAIN)
            )
        if status in (401, 403, 407):
            remedy = "give credentials that may read it, in ~/.netrc (or the file that NETRC names)"
            raise DataError(Problem(where, f"access refused (HTTP {status})", "", remedy))
        if status in _PASSING_STATUSES or status >= 500:
            raise PassingError(f"HTTP {status}", wait=_retry_after(response.headers.get("Retry-After")))
        raise DataError(Problem(where, f"HTTP {status}", "200 or 206", "check the URL"))

    def _failure(self, error: Exception) -> Exception:
        """Return the error to raise for one of urllib3, whose own message contains the URL."""
        from urllib3 import exceptions

        cause = getattr(error, "reason", None)
        cause = cause if isinstance(cause, Exception) else error
        where, text = without_credentials(self._url), scrubbed(str(cause), self._url)
        is_refused = isinstance(cause, exceptions.NewConnectionError)  # a subclass of TimeoutError
        if isinstance(cause, exceptions.TimeoutError) and not is_refused:
            return PassingError(f"almost no bytes for {self._seconds:g} s")
        if isinstance(cause, exceptions.SSLError):
            remedy = "check the server's certificate (SSL_CERT_FILE names the authorities that are trusted)"
            return DataError(Problem(where, text, "", remedy))
        if isinstance(cause, (exceptions.LocationValueError, exceptions.ResponseError)):
            got = scrubbed(str(cause), self._url)
            return DataError(
                Problem(without_credentials(self._url), got, "the URL of a file", "check the URL")
            )
        return PassingError(f"{type(cause).__name__}: {text}")


def pool_manager(proxy: str, most: int) -> Any:
    """Return urllib3's pools of up to `most` connections a host, direct ones if `proxy` is empty.

    Their connections raise an error for a server that is too slow or sends headers without end.
    """
    import urllib3
    from urllib3.connection import HTTPConnection, HTTPSConnection

    class Metered:
        sock: Any

        def connect(self) -> None:
            super().connect()  # type: ignore[misc]
            self.meter = _Meter()
            self.sock = _metered(self.sock, self.meter)

        def getresponse(self) -> Any:
            # A server may send any number of informational responses before the final one.
            self.meter.allow(HEADER_BYTES)
            response = super().getresponse()  # type: ignore[misc]
            response.meter = self.meter
            return response

    class Plain(Metered, HTTPConnection):
        pass

    class Secure(Metered, HTTPSConnection):
        pass

    class PlainPool(urllib3.HTTPConnectionPool):
        ConnectionCls = Plain

    class SecurePool(urllib3.HTTPSConnectionPool):
        ConnectionCls = Secure

    manager = urllib3.ProxyManager(proxy, maxsize=most) if proxy else urllib3.PoolManager(maxsize=most)
    manager.pool_classes_by_scheme = {"http": PlainPool, "https": SecurePool}
    return manager


class _Meter:
    """Counts the bytes of a connection, including those that urllib3 reads by itself, such as header
    lines."""

    def __init__(self) -> None:
        self._waited, self._received = 0.0, 0
        self._left = 0

    def allow(self, num_bytes: int) -> None:
        """Allow so many bytes until the next call."""
        self._left = num_bytes

    def count(self, num_bytes: int, seconds: float, patience: float | None) -> None:
        """Count received bytes. Raise TimeoutError if the rate is too low, OSError for more bytes than
        allowed."""
        self._left -= num_bytes
        if self._left < 0:
            raise OSError("a header without end")
        self._waited, self._received = self._waited + seconds, self._received + num_bytes
        if self._waited > (patience or self._waited):
            if self._received < LEAST_RATE * self._waited:
                raise TimeoutError(f"{self._received} bytes in {self._waited:.0f} s")
            self._waited, self._received = 0.0, 0


class _MeteredSocket(socket.socket):
    """A socket that can have attributes."""


def _metered(connected: Any, meter: _Meter) -> Any:
    """Return the socket with a `recv_into` whose bytes `meter` counts."""
    if type(connected) is socket.socket:
        seconds = connected.gettimeout()
        connected = _MeteredSocket(fileno=connected.detach())
        connected.settimeout(seconds)
    receive = connected.recv_into

    def recv_into(*arguments: Any, **named: Any) -> int:
        began = time.monotonic()
        count: int = receive(*arguments, **named)
        meter.count(count, time.monotonic() - began, connected.gettimeout())
        return count

    connected.recv_into = recv_into
    return connected


def _netrc_credentials(host: str) -> str:
    """Return `user:password` from the user's netrc file, which keeps secrets out of a run's config; or
    nothing."""
    try:
        found = netrc(os.environ.get("NETRC") or Path("~/.netrc").expanduser()).authenticators(host)
    except (OSError, NetrcParseError):
        return ""
    return f"{found[0]}:{found[2]}" if found else ""


def _version(headers: Any) -> str:
    """Return the value for If-Range: a strong ETag, or the time of the last change."""
    etag = headers.get("ETag", "")
    return etag if etag.startswith('"') else headers.get("Last-Modified", "")


def _retry_after(value: str | None) -> float:
    """Return the seconds that the header asks for, as a number or a date; 0 for any other header."""
    from urllib3 import Retry
    from urllib3.exceptions import InvalidHeader

    try:
        return Retry().parse_retry_after(value) if value else 0.0
    except (InvalidHeader, ValueError, OverflowError):
        return 0.0
