"""Explain the errors of libraries for object stores. Recognize each by its status, name or text, so that no
such library needs to be installed.

Seen with adlfs 2026.8 and gcsfs 2026.10, against servers of both protocols.
"""

from __future__ import annotations

import logging
from collections.abc import Iterator

_REFUSED = (401, 403)
_REFUSING = frozenset(
    {"ClientAuthenticationError", "CredentialUnavailableError", "DefaultCredentialsError", "RefreshError"}
)
"""Names of errors of azure-core, azure-identity and google-auth: no credentials, or wrong ones."""
_LOGGERS = ("gcsfs", "adlfs", "azure", "google.auth")
_END_OF_MESSAGE = (" RequestId:", " Attempted credentials:", " Content: <?xml")
"""From here on Azure's errors tell what only its own support can use."""


def is_refusal(error: BaseException) -> bool:
    """Return whether the store lets nobody in with these credentials, or none were found: trying again does
    not help."""
    return any(_refuses(one) for one in _chain(error))


def lacks_bucket(error: BaseException) -> bool:
    """Return whether there is no such bucket (Azure calls it a container)."""
    return any("ContainerNotFound" in str(getattr(one, "error_code", "")) for one in _chain(error))


def message(error: BaseException) -> str:
    """Return the library's message, in one line and as far as it tells something to a person."""
    text = " ".join(str(error).split())
    for end in _END_OF_MESSAGE:
        text = text.partition(end)[0]
    return text


def be_quiet() -> None:
    """Keep the libraries from printing tracebacks of errors that llmtrain tells in a line."""
    for name in _LOGGERS:
        logging.getLogger(name).setLevel(logging.CRITICAL)


def _refuses(error: BaseException) -> bool:
    if isinstance(error, PermissionError):
        return True
    statuses = [getattr(error, name, None) for name in ("status_code", "code", "status")]
    if any(status in _REFUSED for status in statuses if isinstance(status, int)):
        return True
    if _REFUSING.intersection(kind.__name__ for kind in type(error).__mro__):
        return True
    text = str(error).lower()
    if isinstance(error, ValueError):  # adlfs: the environment names no account
        return "credentials" in text or "connection string" in text
    return isinstance(error, OSError) and text.startswith("forbidden")  # gcsfs, of status 403


def _chain(error: BaseException | None) -> Iterator[BaseException]:
    """Yield an error and those that it came from."""
    seen: set[int] = set()
    while error is not None and id(error) not in seen:
        seen.add(id(error))
        yield error
        error = error.__cause__ or error.__context__
