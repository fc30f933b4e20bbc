"""What a user is told of a conversation or a chat template that cannot be used."""

from __future__ import annotations

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
