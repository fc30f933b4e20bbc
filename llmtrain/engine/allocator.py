"""Memory that training frees each step and wants back the next."""

from __future__ import annotations

import ctypes
import sys

_M_TRIM_THRESHOLD, _M_TOP_PAD, _M_MMAP_MAX = -1, -2, -4
_KEEP_BYTES = 2**31 - 1
_GROW_BYTES = 2**28


def keep_freed_memory() -> bool:
    """Let glibc keep large freed blocks for the process instead of giving each back to the kernel, which
    would clear its pages anew at every step. → whether it could be set.

    Call it before the large allocations; a process then stays at its peak resident size.
    """
    if sys.platform != "linux":
        return False
    try:
        mallopt = ctypes.CDLL("libc.so.6").mallopt
    except (OSError, AttributeError):  # another C library
        return False
    settings = ((_M_MMAP_MAX, 0), (_M_TRIM_THRESHOLD, _KEEP_BYTES), (_M_TOP_PAD, _GROW_BYTES))
    results = [mallopt(name, value) for name, value in settings]
    return min(results) == 1
