"""URLs as they may be stored, shown and sent: without what opens the door."""

from __future__ import annotations

import re
from typing import Any

_REMOTE = "https?|s3[an]?|gs|gcs|az|abfss?|adl|wasbs?|hdfs|webhdfs|ftps?|sftp|ssh|smb|hf|github|dropbox"
# A path library makes one slash of two.
_URL = re.compile(rf"(?:[a-z][a-z0-9+.-]*://|(?<![a-z0-9+.-])(?:{_REMOTE}):/+)\S*", re.IGNORECASE)
_START = re.compile(r"""(?:[\w.+~-]+=)?["']?[a-z][a-z0-9+.:-]*://""", re.IGNORECASE)
_TAIL = re.compile(r"""[]'"}),;:.]*$""")
"""What a text has behind a URL: a quote that ends, say."""
_VALUE = re.compile(r"([?&;#][^\s=&?#;]{1,80}=)[^\s&#]+")
"""Of a key in what stands behind a URL with a blank in it."""
_PARAMETERS = re.compile(r";[^/?#;]*=[^/?#;]*")
_BLANK = "\ue000"


def without_credentials(text: str) -> str:
    """`text` with each URL in it without user and password, and without those parts that may open the door: a
    web address' whole query and fragment, which may be a signature, and else the values of keys."""
    if ":/" not in text:
        return text
    if _START.match(text) and text.count("://") == 1 and ": got " not in text:
        # It is one URL, or a key with one: what a blank parts belongs to it too.
        return _masked_in(text.replace(" ", _BLANK)).replace(_BLANK, " ")
    return _masked_in(text)


def without_credentials_in(value: Any) -> Any:
    """A tree of mappings, lists and plain values, its texts and keys `without_credentials`."""
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
    """A query or a fragment; without a key it is a part of a name."""
    if "=" not in part:
        return part
    return "&".join(
        f"{key}=…" if equals else "…" for key, equals, _ in (p.partition("=") for p in part.split("&"))
    )


def _end_of_user(body: str) -> int:
    """Where the host begins. A password that was not quoted may hold any character."""
    authority = re.split(r"[/?#]", body, maxsplit=1)[0]
    if "@" in authority:
        # Up to the last one of the URL where what stands before it is no host and port.
        return (authority if _is_host(authority.rpartition("@")[2]) else body).rfind("@") + 1
    return 0 if _is_host(authority) else body.rfind("@") + 1


def _is_host(authority: str) -> bool:
    """Whether it may be a host, with a port or without."""
    return re.fullmatch(r"(\[[^\]]*\]|[^:\[\]]*)(:\d*)?", authority) is not None
