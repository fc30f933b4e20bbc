"""How this process was started: its command line, and what the launcher (torchrun, Slurm) says in the
environment. Known before torch is imported."""

from __future__ import annotations

import math
import os
import socket
import sys
import time
from collections.abc import Sequence
from importlib import metadata
from pathlib import Path

from llmtrain.errors import ConfigError, LaunchError, Problem

START_SECONDS = 600.0
STOP_SECONDS = 3600.0

_command: list[str] | None = None


def set_command(command: Sequence[str]) -> None:
    """Remember the command line as typed; Hydra needs one of its own in sys.argv."""
    global _command
    _command = list(command)


def command() -> list[str]:
    """The command line as typed, the program first."""
    return list(sys.argv if _command is None else _command)


def start_seconds() -> float:
    """How long the ranks wait for each other at the start: START_TIMEOUT, or START_SECONDS.

    Raises ConfigError for what is no such time.
    """
    return _seconds("START_TIMEOUT", START_SECONDS)


def stop_seconds() -> float:
    """How long a launcher waits for ranks to save and end: STOP_TIMEOUT, or STOP_SECONDS.

    Raises ConfigError for what is no such time.
    """
    return _seconds("STOP_TIMEOUT", STOP_SECONDS)


def _seconds(name: str, default: float) -> float:
    text = os.environ.get(name, "").strip() or str(default)
    try:
        seconds = float(text)
    except ValueError:
        seconds = math.nan
    if not 0 < seconds < math.inf:
        raise ConfigError(Problem(name, repr(text), "seconds", "correct this environment variable"))
    return seconds


def await_host(address: str, port: int, seconds: float, whom: str = "rank 0") -> None:
    """Wait until something listens there, `whom` in the message, as quietly as torch does not.

    Raises LaunchError when nothing does within `seconds`.
    """
    deadline = time.monotonic() + seconds
    while True:
        try:
            socket.create_connection((address, port), timeout=max(1.0, deadline - time.monotonic())).close()
            return
        except OSError as error:
            if time.monotonic() > deadline:
                got = f"no answer from {whom} at {address}:{port} within {seconds:g} s ({error})"
                remedy = f"see what {whom} said, or wait longer by START_TIMEOUT=seconds"
                failure = LaunchError(Problem("start", got, remedy=remedy))
                failure.everywhere = False  # rank 0, which tells for all, isn't there
                raise failure from None
            time.sleep(0.2)


def rank() -> int:
    """Raises LaunchError for what is no rank of the world."""
    number, size = _whole("RANK", 0), world_size()
    if number >= size:
        got = f"{number} with WORLD_SIZE={size}"
        raise LaunchError(Problem("RANK", got, f"0 to {size - 1}", "correct what launches the ranks"))
    return number


def world_size() -> int:
    """Raises LaunchError for what is no number of processes."""
    return _whole("WORLD_SIZE", 1, least=1)


def local_rank() -> int:
    """This process' number on its host. Raises LaunchError for what is no such number."""
    return _whole("LOCAL_RANK", 0)


def on_one_host() -> bool:
    """Whether the launcher says that all ranks run on this host, as torchrun does; others say nothing."""
    return os.environ.get("LOCAL_WORLD_SIZE", "").strip() == str(world_size())


def _whole(name: str, default: int, least: int = 0) -> int:
    text = os.environ.get(name, "").strip() or str(default)
    if not text.isdecimal() or int(text) < least:
        remedy = "correct this environment variable, or launch by torchrun"
        raise LaunchError(Problem(name, repr(text), f"a whole number, {least} or more", remedy))
    return int(text)


def likely_device(name: str) -> str:
    """The device type that `device=name` will take; `auto`: a GPU, where there is one and torch is built for
    GPUs."""
    if name != "auto":
        return name
    return "cuda" if has_gpu_driver() and not metadata.version("torch").endswith("+cpu") else "cpu"


def has_gpu_driver() -> bool:
    """Whether a driver of NVIDIA's is loaded, and its GPUs are not hidden from this process."""
    hidden = os.environ.get("CUDA_VISIBLE_DEVICES") in ("", "-1")
    return not hidden and Path("/proc/driver/nvidia/version").exists()
