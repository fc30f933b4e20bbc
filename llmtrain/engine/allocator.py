"""Memory that training frees each step and wants back the next."""

from __future__ import annotations

import ctypes
import sys
from typing import Any

from llmtrain.track.throughput import memory_bytes

_M_TRIM_THRESHOLD, _M_TOP_PAD, _M_MMAP_MAX = -1, -2, -4
_KEEP_BYTES = 2**31 - 1
_GROW_BYTES = 2**28


def keep_freed_memory() -> bool:
    """Let glibc keep large freed blocks for the process instead of giving each back to the kernel, which
    would clear its pages anew at every step. → whether it could be set.

    Call it before the large allocations. What is kept falls to pieces with time: `Heap` bounds it.
    """
    libc = _glibc()
    if libc is None:
        return False
    settings = ((_M_MMAP_MAX, 0), (_M_TRIM_THRESHOLD, _KEEP_BYTES), (_M_TOP_PAD, _GROW_BYTES))
    results = [libc.mallopt(name, value) for name, value in settings]
    return min(results) == 1


class Heap:
    """Gives freed memory back to the kernel where this process holds more than it was forecast to.

    Blocks of other sizes at each step, as packed documents have them, and the small ones between that stay,
    such as a library's code for each new shape, leave freed memory in pieces too small for the next block:
    a run that used 0.4 GiB came to hold 2.6 GiB after 250 steps.
    """

    SOON = 10
    """Steps. Giving back makes the next step clear its pages anew: a tenth of the steps at most."""

    def __init__(self, forecast_bytes: int) -> None:
        self.limit_bytes = forecast_bytes
        self._libc = _glibc()
        self._steps_since = self.SOON

    def after_step(self) -> bool:
        """Call it after each step. → whether memory was given back."""
        self._steps_since += 1
        if self._libc is None or (held := memory_bytes("cpu")) <= self.limit_bytes:
            return False
        self._libc.malloc_trim(0)
        if self._steps_since <= self.SOON:
            # A forecast below what steps do use must not cost each of them.
            self.limit_bytes = held * 11 // 10
        self._steps_since = 0
        return True


def _glibc() -> Any:
    """None where there is another C library."""
    if sys.platform != "linux":
        return None
    try:
        libc = ctypes.CDLL("libc.so.6")
    except OSError:
        return None
    return libc if hasattr(libc, "mallopt") and hasattr(libc, "malloc_trim") else None
