"""The interface of a remote file, whatever serves it, and the problems that all kinds share."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Protocol
from urllib.parse import unquote, urlsplit

from llmtrain.errors import DataError, Problem
from llmtrain.urls import without_credentials

UPLOAD_AGAIN = "upload the corpus again"


class PassingError(Exception):
    """A temporary failure, after which the transport tries again.

    wait: seconds that the server asks to wait. restart: the download must begin anew.
    """

    def __init__(self, reason: str, wait: float = 0.0, restart: bool = False) -> None:
        super().__init__(reason)
        self.reason = reason
        self.wait = wait
        self.restart = restart


class Source(Protocol):
    """A remote file."""

    version: str
    """A value that changes with the file's content, as an ETag does; empty: not known."""

    def describe(self) -> tuple[int | None, str]:
        """Return the size in bytes, if known, and the version. Raises as `chunks`."""

    def chunks(self, offset: int, size: int | None, at_most: int) -> Iterator[tuple[int, bytes]]:
        """Yield (position, bytes) from `offset`, or from an earlier position, to the end of the file.

        size: bytes that the file must have. at_most: bytes that it may have. Raises PassingError,
        TarFileError, DataError.
        """


def is_http(url: str) -> bool:
    return url.lower().startswith(("http://", "https://"))


def scrubbed(text: str, url: str) -> str:
    """Return the message of a library without the secrets of `url`."""
    parts = urlsplit(url)
    user = parts.netloc.rpartition("@")[0]
    text = text.replace(url, without_credentials(url))
    for secret in (user, parts.query, parts.fragment, unquote(user.partition(":")[2])):
        if secret:
            text = text.replace(secret, "…")
    return text


def refuse_longer(url: str, size: int | None, at_most: int) -> None:
    """Raise DataError for a file whose size so far, or announced size, is more than `at_most`."""
    if size is not None and size > at_most:
        got = f"a file of {size:,} bytes or more"
        raise DataError(Problem(without_credentials(url), got, f"{at_most:,} bytes at most", UPLOAD_AGAIN))


def missing(url: str, reason: str) -> Problem:
    return Problem(without_credentials(url), f"no such file ({reason})", "a file of the corpus", UPLOAD_AGAIN)


def wrong_size(url: str, size: int, expected: int) -> Problem:
    kind = "a truncated file" if size < expected else "a file that is too long,"
    got = f"{kind} of {size} bytes" if size < expected else f"{kind} {size} bytes or more"
    return Problem(without_credentials(url), got, f"{expected} bytes", UPLOAD_AGAIN)
