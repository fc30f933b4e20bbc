"""How this process was started: its command line, and what the launcher (torchrun, Slurm) says in the
environment. Known before torch is imported."""

from __future__ import annotations

import math
import os
import sys
from collections.abc import Sequence
from pathlib import Path

from llmtrain.errors import ConfigError, Problem

START_SECONDS = 600.0

_command: list[str] | None = None
_told_to_stop = False


def set_command(command: Sequence[str]) -> None:
    """Remember the command line as typed; Hydra needs one of its own in sys.argv."""
    global _command
    _command = list(command)


def command() -> list[str]:
    """The command line as typed, the program first."""
    return list(sys.argv if _command is None else _command)


def note_stop() -> None:
    """Remember that a signal asked this process to stop."""
    global _told_to_stop
    _told_to_stop = True


def was_told_to_stop() -> bool:
    return _told_to_stop


def start_seconds() -> float:
    """How long the ranks wait for each other at the start: START_TIMEOUT, or START_SECONDS.

    Raises ConfigError for what is no such time.
    """
    text = os.environ.get("START_TIMEOUT", "").strip() or str(START_SECONDS)
    try:
        seconds = float(text)
    except ValueError:
        seconds = math.nan
    if not 0 < seconds < math.inf:
        raise ConfigError(
            Problem("START_TIMEOUT", repr(text), "seconds", "correct this environment variable")
        )
    return seconds


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
