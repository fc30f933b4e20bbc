"""How this process was started: its command line, and what the launcher (torchrun, Slurm) says in the
environment. Known before torch is imported."""

from __future__ import annotations

import os
import sys
from collections.abc import Sequence
from pathlib import Path

_command: list[str] | None = None


def set_command(command: Sequence[str]) -> None:
    """Remember the command line as typed; Hydra needs one of its own in sys.argv."""
    global _command
    _command = list(command)


def command() -> list[str]:
    """The command line as typed, the program first."""
    return list(sys.argv if _command is None else _command)


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
