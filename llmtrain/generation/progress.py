"""Progress of a long generation."""

from __future__ import annotations

import sys
import time

PROGRESS_SECONDS = 5.0
"""Between two lines that say how many prompts are done."""


class Progress:
    """Says on stderr how many prompts are done, every few seconds."""

    def __init__(self, count: int, what: str = "") -> None:
        """what: the prompts' name in the line, before "done"."""
        self._count, self._done, self._said = count, 0, time.monotonic()
        self._what = f" {what}" if what else ""

    def __call__(self, index: int) -> None:
        self._done += 1
        if time.monotonic() - self._said > PROGRESS_SECONDS:
            self._said = time.monotonic()
            text = f"{self._done:,} of {self._count:,}{self._what} done"
            print(text, file=sys.stderr, flush=True)
