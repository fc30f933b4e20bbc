"""What this machine has."""

from __future__ import annotations

import os
from pathlib import Path


def memory_bytes() -> int:
    """This machine's memory, or the share of it that the container may use."""
    import psutil

    total: int = psutil.virtual_memory().total
    for limit in ("/sys/fs/cgroup/memory.max", "/sys/fs/cgroup/memory/memory.limit_in_bytes"):
        try:
            total = min(total, int(Path(limit).read_text()))
        except (OSError, ValueError):  # no such limit, or "max"
            continue
    return total


def has_bf16() -> bool:
    """Whether oneDNN has an LSTM in bf16 for this machine's processor; where that is not known, no."""
    try:
        flags = set(Path("/proc/cpuinfo").read_text().split())
    except OSError:
        return False
    return flags >= {"avx512bw", "avx512vl", "avx512dq"} or "bf16" in flags  # x86, ARM


def processes_here(world_size: int) -> int:
    """How many of the run's processes share this machine: what the launcher says, or else all."""
    return int(os.environ.get("LOCAL_WORLD_SIZE", world_size))
