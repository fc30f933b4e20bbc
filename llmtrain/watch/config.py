"""Config of the watch over a run: time limits, slow ranks, and comparison of collectives. Free of torch."""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass

from llmtrain.config import require
from llmtrain.errors import Problem

SHORTEST_SECONDS = 2.0
"""Shortest limit: ranks look at each other twice a second."""


@dataclass(frozen=True)
class WatchConfig:
    """Ends a run in which no rank makes progress, and names the rank that is behind; names slow ranks."""

    hang_seconds: float = 60.0
    """Seconds without progress of any rank in a step until a report names the rank that is behind and the job
    ends. A run whose ranks have paused longer before is given three times the longest pause. 0: nothing is
    watched, whatever the other limits say."""
    start_seconds: float = 1800.0
    """The same limit from the meeting of the ranks to the end of the first step; 0: none."""
    data_seconds: float = 600.0
    """The same limit while a rank waits for data, which may come from elsewhere; 0: none."""
    evaluation_seconds: float = 1800.0
    """The same limit in evaluations; 0: none."""
    save_seconds: float = 1800.0
    """The same limit while a rank saves; 0: none."""
    stragglers: bool = True
    """Whether times of each phase are measured on all ranks, go to the trackers, and slow ranks are named."""
    times_every: int = 20
    """Steps between two gatherings of these times."""
    straggler_factor: float = 1.5
    """A rank is slow if its own work, without waiting for others, takes so many times the median of the ranks
    that do the same work."""
    straggler_steps: int = 60
    """Steps for which a rank must be slow until it is named."""

    def problems(self) -> Iterator[Problem]:
        for name in ("hang", "start", "data", "evaluation", "save"):
            seconds = getattr(self, f"{name}_seconds")
            fits = seconds == 0 or SHORTEST_SECONDS <= seconds < math.inf
            allowed = f"{SHORTEST_SECONDS:g} or more, or 0 for none"
            yield from require(fits, f"{name}_seconds", seconds, allowed)
        yield from require(self.times_every >= 1, "times_every", self.times_every, "1 or more")
        fits = 1 < self.straggler_factor < math.inf
        yield from require(fits, "straggler_factor", self.straggler_factor, "more than 1")
        fits = self.straggler_steps >= self.times_every
        allowed = f"watch.times_every={self.times_every} or more"
        yield from require(fits, "straggler_steps", self.straggler_steps, allowed)


@dataclass(frozen=True)
class DebugConfig:
    """Checks that cost time, for a run that goes wrong."""

    collectives: bool = False
    """Whether the collectives of all ranks are compared while they run: kind, group, shape, type, and the
    step. The first call in which a rank differs from the others ends the job and is named with its source
    line."""
