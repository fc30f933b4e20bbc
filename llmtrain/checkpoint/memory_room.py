"""Whether the copies of the state in memory have room, asked before ranks join. Free of torch."""

from __future__ import annotations

import os
import shutil
from pathlib import Path

from llmtrain.checkpoint.config import GENERATIONS, SHARED_MEMORY, MemoryConfig
from llmtrain.distributed import launcher
from llmtrain.distributed.memory_folder import MEMORY
from llmtrain.distributed.restarts import ATTEMPT
from llmtrain.errors import ConfigError, Problem
from llmtrain.plan.units import gib


def refuse_without_room(config: MemoryConfig, saved_bytes: int) -> None:
    """Raise ConfigError if the folder of this host has no room for the copies of all its ranks and of
    those of its neighbour. Only the first attempt of a job is refused: a later one goes on without copies.

    saved_bytes: what one rank saves.
    """
    folder = os.environ.get(MEMORY)
    if config.every is None or folder is None or os.environ.get(ATTEMPT, "1") != "1":
        return
    ranks = int(os.environ.get("LOCAL_WORLD_SIZE", 1))
    of_hosts = 1 if launcher.on_one_host() else 2
    needed = GENERATIONS * of_hosts * ranks * saved_bytes
    free = shutil.disk_usage(folder).free
    if needed <= free:
        return
    place = Path(folder).parent
    got = f"{place} with {gib(free)} free"
    neighbours = " and of as many of the neighbour" if of_hosts > 1 else ""
    allowed = f"{gib(needed)}, for {GENERATIONS} copies of what {ranks} ranks save{neighbours}"
    larger = " or make it larger (mount -o remount,size=…)" if place == SHARED_MEMORY else ""
    remedy = f"name a local NVMe disk{larger}, or leave out checkpoint.memory.every"
    raise ConfigError(Problem("checkpoint.memory.dir", got, allowed, remedy))
