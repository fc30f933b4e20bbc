"""What the launcher (torchrun, Slurm) says in the environment, known before torch is imported."""

from __future__ import annotations

import os
from pathlib import Path


def rank() -> int:
    return int(os.environ.get("RANK", "0"))


def world_size() -> int:
    return int(os.environ.get("WORLD_SIZE", "1"))


def local_rank() -> int:
    """This process' number on its host."""
    return int(os.environ.get("LOCAL_RANK", "0"))


def likely_device(name: str) -> str:
    """The device type that `device=name` will take: for `auto`, whether a GPU driver is loaded."""
    if name != "auto":
        return name
    hidden = os.environ.get("CUDA_VISIBLE_DEVICES") == ""
    return "cuda" if not hidden and Path("/proc/driver/nvidia/version").exists() else "cpu"
