"""Errors in conversations and chat templates, with the texts that users see."""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any

LONGEST = 300
"""Maximum characters of a message that a template gives."""


class ChatError(ValueError):
    """A conversation or a template that cannot be used: what was got, and what is allowed, two phrases."""

    def __init__(self, got: str, allowed: str) -> None:
        super().__init__(got, allowed)
        self.got, self.allowed = got, allowed


def short(text: str) -> str:
    """Return one line of the text, clipped."""
    line = " ".join(text.split())
    return line if len(line) <= LONGEST else f"{line[:LONGEST]}…"


_RESERVED = re.compile("[\ufdd0-\ufdef]")
_SURROGATE = re.compile("[\ud800-\udfff]")


def check_text(value: Any) -> None:
    """Raise ChatError for text, anywhere in a value of JSON, that contains the marks used here, or that has
    no UTF-8."""
    if isinstance(value, str):
        if _RESERVED.search(value):
            raise ChatError("a character of U+FDD0 to U+FDEF", "text without these, which Unicode reserves")
        if _SURROGATE.search(value):
            raise ChatError("text with a lone surrogate", "text that has UTF-8")
    elif isinstance(value, Mapping):
        for part in value.values():
            check_text(part)
    elif isinstance(value, list | tuple):
        for part in value:
            check_text(part)
