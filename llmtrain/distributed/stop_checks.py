"""Check regularly, on all ranks together, whether any of them was asked to stop."""

from __future__ import annotations

import time
from collections.abc import Callable

import torch

from llmtrain.distributed import processes

CHECK_SECONDS = 2.0
"""Approximate interval between all-reduces: long enough that their cost does not matter."""
MAX_GROWTH = 4
"""The interval, in calls, grows at most by this factor at a time."""


class StoppedError(Exception):
    """All ranks agreed to stop in the middle of a piece of work, which counts as not begun."""


class StopCheck:
    """A collective check for stop requests; all ranks call it equally often, between parts of long work."""

    def __init__(self, asked: Callable[[], bool], device: torch.device) -> None:
        """asked: returns whether this process was asked to stop."""
        self._asked, self._device = asked, device
        self._parts_per_check = 1
        self.begin()

    def begin(self) -> None:
        """Start the timing of new work. Once the duration of its parts is known, work that takes less than
        CHECK_SECONDS runs without communication."""
        self._parts, self._since = 0, time.monotonic()

    def check(self) -> None:
        """Raise StoppedError on all ranks if any of them was asked to stop."""
        if processes.world_size() == 1:
            if self._asked():
                raise StoppedError
            return
        self._parts += 1
        if self._parts < self._parts_per_check:
            return
        # Integers: all ranks must get the same sum, whatever the order of addition.
        milliseconds = int(1000 * (time.monotonic() - self._since))
        counts = torch.tensor([int(self._asked()), milliseconds], device=self._device)
        num_asked, total = processes.all_sum(counts).tolist()
        if num_asked:
            raise StoppedError
        seconds = max(total, 1) / 1000 / processes.world_size() / self._parts
        self._parts_per_check = max(1, min(MAX_GROWTH * self._parts, int(CHECK_SECONDS / seconds)))
        self.begin()
