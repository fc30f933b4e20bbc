"""Measure tokens per second and memory of a run."""

from __future__ import annotations

from collections import deque


class ThroughputMeter:
    """Measures tokens per second over the last `window` steps.

    The first step of a process, which allocates and compiles, counts only until the second one is done.
    """

    def __init__(self, window: int = 20) -> None:
        self._steps: deque[tuple[int, float]] = deque(maxlen=window)
        self._is_warm = False

    def add(self, tokens: int, seconds: float) -> None:
        """Add a step. tokens: number of tokens over all replicas; seconds: duration."""
        if self._steps and not self._is_warm:
            self._steps.clear()
            self._is_warm = True
        self._steps.append((tokens, seconds))

    @property
    def tokens_per_second(self) -> float:
        """Average over the window; 0 before the first step is done."""
        seconds = sum(s for _, s in self._steps)
        return sum(t for t, _ in self._steps) / seconds if seconds > 0 else 0.0


def memory_bytes(device_type: str) -> int:
    """Return the peak of allocated bytes on a cuda device; resident bytes of this process elsewhere."""
    if device_type == "cuda":
        import torch

        return torch.cuda.max_memory_allocated()
    import psutil

    return psutil.Process().memory_info().rss
