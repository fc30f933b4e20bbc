"""Looks, taken by all ranks together, whether one of them was asked to stop."""

from __future__ import annotations

import time
from collections.abc import Callable

import torch

from llmtrain.distributed import processes

LOOK_SECONDS = 2.0
"""About so often ranks look: what a look costs is nothing beside it."""
MOST_GROWTH = 4


class StoppedError(Exception):
    """All ranks agreed to stop here, in the middle of something, which counts as not begun."""


class Lookout:
    """All ranks call `check` alike, between parts of what may be long."""

    def __init__(self, asked: Callable[[], bool], device: torch.device) -> None:
        """asked: whether this process was asked to stop."""
        self._asked, self._device = asked, device
        self._parts_a_look = 1
        self.begin()

    def begin(self) -> None:
        """What comes now is new: nothing is looked at while it is shorter than LOOK_SECONDS, once it is known
        how long its parts take."""
        self._parts, self._since = 0, time.monotonic()

    def check(self) -> None:
        """Raise StoppedError, on all ranks or none."""
        if processes.world_size() == 1:
            if self._asked():
                raise StoppedError
            return
        self._parts += 1
        if self._parts < self._parts_a_look:
            return
        # Whole numbers: all ranks must come to the same sum, whatever the order of adding.
        milliseconds = int(1000 * (time.monotonic() - self._since))
        told = torch.tensor([int(self._asked()), milliseconds], device=self._device)
        num_asked, total = processes.all_sum(told).tolist()
        if num_asked:
            raise StoppedError
        seconds = max(total, 1) / 1000 / processes.world_size() / self._parts
        self._parts_a_look = max(1, min(MOST_GROWTH * self._parts, int(LOOK_SECONDS / seconds)))
        self.begin()
