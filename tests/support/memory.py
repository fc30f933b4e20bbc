"""What torch really allocates on the CPU."""

from __future__ import annotations

import gc
from collections.abc import Callable
from typing import Any, NamedTuple

import torch


class Allocated(NamedTuple):
    """Bytes of torch's allocator above what it held before."""

    kept: int
    """After the forward pass, its result alive: what waits for the backward pass."""
    peak: int
    """Most at any time of both passes."""


def allocated(loss: Callable[[], torch.Tensor]) -> Allocated:
    """Of `loss()` and of its backward pass."""
    now, kept, peak = 0, 0, 0
    result: Any = None

    def forward() -> None:
        nonlocal result
        result = loss()

    gc.collect()  # what is freed meanwhile would be counted
    for work in (forward, lambda: result.backward()):
        with torch.profiler.profile(
            activities=[torch.profiler.ProfilerActivity.CPU], profile_memory=True
        ) as run:
            work()
        for event in run.profiler.kineto_results.events():
            if event.name() == "[memory]":
                now += event.nbytes()
                peak = max(peak, now)
        kept = kept or now
    return Allocated(kept, peak)
