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


def processes_here(world_size: int) -> int:
    """How many of the run's processes share this machine: what the launcher says, or else all."""
    return int(os.environ.get("LOCAL_WORLD_SIZE", world_size))
