"""Text for a person: whether it is fit to be printed."""

from __future__ import annotations

from llmtrain.errors import UserError

LONGEST_LINE = 5000


class UncleanError(Exception):
    """It is not."""


def check_refusal(error: UserError) -> None:
    """Raise UncleanError unless each problem is one line that steers no terminal and is short enough to be
    read."""
    text = str(error)
    lines = text.split("\n")
    if len(lines) != len(error.problems) or not error.problems:
        raise UncleanError(f"{len(lines)} lines for {len(error.problems)} problems: {text[:200]!r}")
    check_printed(text)


def check_printed(text: str) -> None:
    """Raise UncleanError for characters that steer a terminal, and for lines without end."""
    for line in text.split("\n"):
        # Bytes of names that are no UTF-8 stay as Python holds them.
        odd = [c for c in line if not c.isprintable() and not "\udca0" <= c <= "\udcff" and c != "\t"]
        if odd:
            raise UncleanError(f"{odd[0]!r} in {line[:200]!r}")
        if len(line) > LONGEST_LINE:
            raise UncleanError(f"a line of {len(line):,} characters: {line[:100]!r}…")
