"""Measure how long each phase takes, without the time in collectives, in which a rank waits for others."""

from __future__ import annotations

import time
from typing import Any, Protocol

import torch

from llmtrain.watch.layout import PHASES

NUM_CATEGORIES = len(PHASES) + 1
"""The phases, and communication."""


class Clock(Protocol):
    """Sums the time of each category."""

    def mark(self, category: int) -> None:
        """Count time from now on for this category."""

    def take(self) -> list[float]:
        """Return the seconds of each category since the last call."""


class WallClock:
    """For work that is done when its call returns, as on a CPU."""

    def __init__(self) -> None:
        self._seconds = [0.0] * NUM_CATEGORIES
        self._category = 0
        self._since = time.perf_counter()

    def mark(self, category: int) -> None:
        now = time.perf_counter()
        self._seconds[self._category] += now - self._since
        self._category, self._since = category, now

    def take(self) -> list[float]:
        self.mark(self._category)
        taken, self._seconds = self._seconds, [0.0] * NUM_CATEGORIES
        return taken


class CudaClock:
    """For work that a GPU does later: an event is put into the stream at each mark, and read once it has
    passed, without waiting for it. What has not passed yet is counted the next time."""

    def __init__(self) -> None:
        self._marks: list[tuple[Any, int]] = []
        self._free: list[Any] = []

    def mark(self, category: int) -> None:
        if self._marks and self._marks[-1][1] == category:
            return
        event = self._free.pop() if self._free else torch.cuda.Event(enable_timing=True)
        event.record()
        self._marks.append((event, category))

    def take(self) -> list[float]:
        seconds = [0.0] * NUM_CATEGORIES
        done = 0
        for (start, category), (end, _) in zip(self._marks, self._marks[1:], strict=False):
            if not end.query():
                break
            seconds[category] += start.elapsed_time(end) / 1000
            self._free.append(start)
            done += 1
        del self._marks[:done]
        return seconds
