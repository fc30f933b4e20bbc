"""What any rank found, told to all: agreed through the ranks' store, from any thread, at any time.

Not a collective of a process group: these must be called in one order on all ranks, and the threads that
read ahead have none.
"""

from __future__ import annotations

import os
import time
from collections.abc import Callable, Sequence

import torch.distributed as dist

from llmtrain.errors import LaunchError, Problem

POLL_SECONDS = 0.01, 0.5
PATIENCE_SECONDS = 3600.0
"""How long the others may look for what they have to tell."""


class Union:
    """Sets of numbers, each rank's part of them joined."""

    def __init__(self, store: dist.Store, size: int) -> None:
        attempt = os.environ.get("TORCHELASTIC_RESTART_COUNT", "0")
        self._store = dist.PrefixStore(f"union/{attempt}", store)
        self._size = size

    def __call__(
        self, key: str, numbers: Sequence[int], gave_up: Callable[[], bool] = lambda: False
    ) -> list[int]:
        """All ranks call it with the same `key` and get the numbers of all, ascending.

        Raises LaunchError when not all have called it in an hour, or once nobody waits for the answer.
        """
        if numbers:
            place = self._store.add(f"{key}/lists", 1)
            self._store.set(f"{key}/list {place}", ",".join(map(str, numbers)))
        told = self._store.add(f"{key}/ranks", 1)
        pause, longest = POLL_SECONDS
        deadline = time.monotonic() + PATIENCE_SECONDS
        while told < self._size:
            if gave_up() or time.monotonic() > deadline:
                got = f"{told} of {self._size} ranks"
                raise LaunchError(
                    Problem("data.on_bad_shard=skip", got, "all ranks", "look for one that hangs")
                )
            time.sleep(pause)
            pause = min(2 * pause, longest)
            told = self._store.add(f"{key}/ranks", 0)
        lists = range(1, self._store.add(f"{key}/lists", 0) + 1)
        texts = [self._store.get(f"{key}/list {place}").decode() for place in lists]
        return sorted({int(number) for text in texts for number in text.split(",")})


def of_all_ranks() -> Union | None:
    """Among all ranks; None for a process alone."""
    if not dist.is_initialized() or dist.get_world_size() == 1:
        return None
    return Union(dist.distributed_c10d._get_default_store(), dist.get_world_size())
