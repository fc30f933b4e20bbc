"""Memory and processor of this machine."""

from __future__ import annotations

import os
from pathlib import Path


def memory_bytes() -> int:
    """Return the bytes of memory of this machine, or of its container if that has a limit."""
    import psutil

    total: int = psutil.virtual_memory().total
    for limit in ("/sys/fs/cgroup/memory.max", "/sys/fs/cgroup/memory/memory.limit_in_bytes"):
        try:
            total = min(total, int(Path(limit).read_text()))
        except (OSError, ValueError):  # no such limit, or "max"
            continue
    return total


def has_bf16() -> bool:
    """Return whether oneDNN has a bf16 LSTM for this machine's processor; False when that is unknown."""
    try:
        flags = set(Path("/proc/cpuinfo").read_text().split())
    except OSError:
        return False
    return flags >= {"avx512bw", "avx512vl", "avx512dq"} or "bf16" in flags  # x86, ARM


def processes_here(world_size: int) -> int:
    """Return how many processes of the run share this machine: the launcher's number, else all."""
    return int(os.environ.get("LOCAL_WORLD_SIZE", world_size))
