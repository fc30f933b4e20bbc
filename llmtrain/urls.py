"""URLs as they may be stored, shown and sent: without what opens the door."""

from __future__ import annotations

import re
from typing import Any

_USER = re.compile(r"(?<=://)[^/?#\s]*@")
_WEB_QUERY = re.compile(r"(https?://[^\s?'\",}\]]*)\?[^\s'\",}\]]*", re.IGNORECASE)
_SECRET = re.compile(
    r"([?&][^=&\s]*(?:sig|token|secret|key|pass|pwd|credential|auth|sas)[^=&\s]*=)[^&\s'\",}\]]+",
    re.IGNORECASE,
)


def without_credentials(text: str) -> str:
    """`text` with each URL in it without user and password, and without those parts of its query that may
    open the door: a web address' whole query, which may be a signature, and else the values of keys."""
    if "://" not in text:
        return text
    return _SECRET.sub(r"\1…", _WEB_QUERY.sub(r"\1", _USER.sub("", text)))


def without_credentials_in(value: Any) -> Any:
    """A tree of mappings, lists and plain values, its texts and keys `without_credentials`."""
    if isinstance(value, dict):
        return {without_credentials_in(key): without_credentials_in(item) for key, item in value.items()}
    if isinstance(value, list):
        return [without_credentials_in(item) for item in value]
    return without_credentials(value) if isinstance(value, str) else value
