"""Set union across ranks via the TCPStore; callable from any thread.

Not a collective of a process group: all ranks must call collectives in the same order, and prefetch threads
have no common order.
"""

from __future__ import annotations

import itertools
import os
import time
from collections.abc import Callable, Sequence

import torch.distributed as dist

from llmtrain.errors import LaunchError, Problem

POLL_SECONDS = 0.01, 0.5
TIMEOUT_SECONDS = 3600.0
"""How long to wait for the sets of the other ranks."""
_numbers = itertools.count()


class SetUnion:
    """Computes the union of one set of integers per rank."""

    def __init__(self, store: dist.Store, size: int, number: int = 0) -> None:
        """number: tells apart those of one process, whose keys may be the same."""
        attempt = os.environ.get("TORCHELASTIC_RESTART_COUNT", "0")
        self._store = dist.PrefixStore(f"union/{attempt}/{number}", store)
        self._size = size

    def __call__(
        self, key: str, numbers: Sequence[int], gave_up: Callable[[], bool] = lambda: False
    ) -> list[int]:
        """Return the union of the `numbers` of all ranks, ascending. All ranks must pass the same `key`.

        gave_up: returns whether the caller no longer needs the result.
        Raise LaunchError if not all ranks have called it within TIMEOUT_SECONDS, or `gave_up` returns true.
        """
        if numbers:
            number = self._store.add(f"{key}/lists", 1)
            self._store.set(f"{key}/list {number}", ",".join(map(str, numbers)))
        arrived = self._store.add(f"{key}/ranks", 1)
        pause, longest = POLL_SECONDS
        deadline = time.monotonic() + TIMEOUT_SECONDS
        while arrived < self._size:
            if gave_up() or time.monotonic() > deadline:
                got = f"an answer from {arrived} of {self._size} ranks"
                raise LaunchError(
                    Problem("data.on_bad_tar=skip", got, "all ranks", "look for a rank that hangs")
                )
            time.sleep(pause)
            pause = min(2 * pause, longest)
            arrived = self._store.add(f"{key}/ranks", 0)
        num_lists = self._store.add(f"{key}/lists", 0)
        texts = [self._store.get(f"{key}/list {number}").decode() for number in range(1, num_lists + 1)]
        return sorted({int(number) for text in texts for number in text.split(",")})


def of_all_ranks() -> SetUnion | None:
    """Return a union over all ranks of the process group, which call this equally often; None for a single
    process."""
    if not dist.is_initialized() or dist.get_world_size() == 1:
        return None
    return SetUnion(dist.distributed_c10d._get_default_store(), dist.get_world_size(), next(_numbers))
