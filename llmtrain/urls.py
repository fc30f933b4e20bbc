"""Remove credentials from URLs before they are stored, shown or sent."""

from __future__ import annotations

import re
from typing import Any

_REMOTE = "https?|s3[an]?|gs|gcs|az|abfss?|adl|wasbs?|hdfs|webhdfs|ftps?|sftp|ssh|smb|hf|github|dropbox"
# Path libraries reduce two slashes to one.
_URL = re.compile(rf"(?:[a-z][a-z0-9+.-]*://|(?<![a-z0-9+.-])(?:{_REMOTE}):/+)\S*", re.IGNORECASE)
_START = re.compile(r"""(?:[\w.+~-]+=)?["']?[a-z][a-z0-9+.:-]*://""", re.IGNORECASE)
_TAIL = re.compile(r"""[]'"}),;:.]*$""")
"""Characters after a URL in a text, such as a closing quote."""
_VALUE = re.compile(r"([?&;#][^\s=&?#;]{1,80}=)[^\s&#]+")
"""A key with its value, in the text after a blank in a URL."""
_PARAMETERS = re.compile(r";[^/?#;]*=[^/?#;]*")
_BLANK = "\ue000"


def without_credentials(text: str) -> str:
    """Return `text` with credentials removed from its URLs: user, password, and for http(s) the query and
    fragment, which may contain a signature; for other protocols the values in query and fragment."""
    if ":/" not in text:
        return text
    if _START.match(text) and text.count("://") == 1 and ": got " not in text:
        # The text is a single URL, or a key with one: the part after a blank belongs to it too.
        return _masked_in(text.replace(" ", _BLANK)).replace(_BLANK, " ")
    return _masked_in(text)


def without_credentials_in(value: Any) -> Any:
    """Apply `without_credentials` to all texts and keys in a tree of mappings, lists and plain values."""
    if isinstance(value, dict):
        return {without_credentials_in(key): without_credentials_in(item) for key, item in value.items()}
    if isinstance(value, list):
        return [without_credentials_in(item) for item in value]
    return without_credentials(value) if isinstance(value, str) else value


def _masked_in(text: str) -> str:
    return _VALUE.sub(r"\1…", _URL.sub(lambda found: _masked(found[0]), text))


def _masked(url: str) -> str:
    scheme, slashes, rest = re.split(r"(:/+)", url, maxsplit=1)
    tail = _TAIL.search(rest)
    end = tail[0] if tail else ""
    body = rest[: len(rest) - len(end)]
    body = body[_end_of_user(body) :]
    path, *more = re.split(r"([?#])", body)
    if scheme.lower() not in ("http", "https"):
        path += "".join(map(_without_values, more))
    return f"{scheme}{slashes}{_PARAMETERS.sub('', path)}{end}"


def _without_values(part: str) -> str:
    """Return a query or fragment without values; without a key it is part of a name and stays."""
    if "=" not in part:
        return part
    return "&".join(
        f"{key}=…" if equals else "…" for key, equals, _ in (p.partition("=") for p in part.split("&"))
    )


def _end_of_user(body: str) -> int:
    """Return the offset of the host. An unquoted password may contain any character."""
    authority = re.split(r"[/?#]", body, maxsplit=1)[0]
    if "@" in authority:
        # If the part after the @ is not a host and port, the password extends to the last @ of the URL.
        return (authority if _is_host(authority.rpartition("@")[2]) else body).rfind("@") + 1
    return 0 if _is_host(authority) else body.rfind("@") + 1


def _is_host(authority: str) -> bool:
    """Return whether `authority` may be a host with an optional port."""
    return re.fullmatch(r"(\[[^\]]*\]|[^:\[\]]*)(:\d*)?", authority) is not None
