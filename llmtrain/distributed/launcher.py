"""Read how this process was started: its command line and the variables of the launcher (torchrun, Slurm).

Does not import torch.
"""

from __future__ import annotations

import math
import os
import socket
import sys
import time
from collections.abc import Sequence
from importlib import metadata
from pathlib import Path

from llmtrain.distributed.restarts import ELASTIC
from llmtrain.errors import ConfigError, LaunchError, Problem

START_SECONDS = 600.0
STOP_SECONDS = 3600.0
JOIN_SECONDS = 30.0

_command: list[str] | None = None


class MissingHostsError(LaunchError):
    """Hosts that did not come, or gave no answer: no mistake in the settings, as they may come to the next
    start."""


def set_command(command: Sequence[str]) -> None:
    """Record the command line as typed, because Hydra needs a different sys.argv."""
    global _command
    _command = list(command)


def command() -> list[str]:
    """Return the command line as typed, including the program."""
    return list(sys.argv if _command is None else _command)


def start_seconds() -> float:
    """Return how long ranks wait for each other at the start: START_TIMEOUT, default START_SECONDS.

    Raise ConfigError if the variable is not a positive number.
    """
    return _seconds("START_TIMEOUT", START_SECONDS)


def stop_seconds() -> float:
    """Return how long a launcher waits for ranks to save and exit: STOP_TIMEOUT, default STOP_SECONDS.

    Raise ConfigError if the variable is not a positive number.
    """
    return _seconds("STOP_TIMEOUT", STOP_SECONDS)


def join_seconds() -> float:
    """Return how long an elastic job that could run waits for more hosts at its start: JOIN_TIMEOUT, default
    JOIN_SECONDS.

    Raise ConfigError if the variable is not a positive number.
    """
    return _seconds("JOIN_TIMEOUT", JOIN_SECONDS)


def _seconds(name: str, default: float) -> float:
    text = os.environ.get(name, "").strip() or str(default)
    try:
        seconds = float(text)
    except ValueError:
        seconds = math.nan
    if not 0 < seconds < math.inf:
        remedy = "correct this environment variable"
        raise ConfigError(Problem(name, repr(text), "a positive number of seconds", remedy))
    return seconds


def await_host(address: str, port: int, seconds: float, peer: str = "rank 0") -> None:
    """Wait until something listens at `address` and `port`, without the log lines of torch's own wait.

    peer: name of the peer in the error message.
    Raise MissingHostsError if nothing listens within `seconds`.
    """
    deadline = time.monotonic() + seconds
    while True:
        try:
            socket.create_connection((address, port), timeout=max(1.0, deadline - time.monotonic())).close()
            return
        except OSError as error:
            if time.monotonic() > deadline:
                got = f"no answer from {peer} at {address}:{port} within {seconds:g} s ({error})"
                remedy = f"see the messages of {peer}, or wait longer with START_TIMEOUT=seconds"
                failure = MissingHostsError(Problem("start", got, remedy=remedy))
                failure.everywhere = False  # rank 0, which prints common errors, is not there
                raise failure from None
            time.sleep(0.2)


def rank() -> int:
    """Return RANK, default 0. Raise LaunchError if it is not a rank of the world."""
    number, size = _whole("RANK", 0), world_size()
    if number >= size:
        got = f"{number} with WORLD_SIZE={size}"
        raise LaunchError(Problem("RANK", got, f"0 to {size - 1}", "correct the launcher of the ranks"))
    return number


def world_size() -> int:
    """Return WORLD_SIZE, default 1. Raise LaunchError if it is not a positive integer."""
    return _whole("WORLD_SIZE", 1, least=1)


def local_rank() -> int:
    """Return LOCAL_RANK, the number of this process on its host. Raise LaunchError if it is not an
    integer."""
    return _whole("LOCAL_RANK", 0)


def on_one_host() -> bool:
    """Return whether the launcher declares that all ranks run on this host. Only torchrun does."""
    return os.environ.get("LOCAL_WORLD_SIZE", "").strip() == str(world_size())


def is_elastic() -> bool:
    """Return whether the launcher may start fewer processes than the layout asks for."""
    return bool(os.environ.get(ELASTIC))


def _whole(name: str, default: int, least: int = 0) -> int:
    text = os.environ.get(name, "").strip() or str(default)
    if not text.isdecimal() or int(text) < least:
        remedy = "correct this environment variable, or launch by torchrun"
        raise LaunchError(Problem(name, repr(text), f"a whole number, {least} or more", remedy))
    return int(text)


def likely_device(name: str) -> str:
    """Return the device type that `device=name` will select. `auto` selects a GPU if there is one and torch
    is built for GPUs."""
    if name != "auto":
        return name
    return "cuda" if has_gpu_driver() and not metadata.version("torch").endswith("+cpu") else "cpu"


def has_gpu_driver() -> bool:
    """Return whether an NVIDIA driver is loaded and its GPUs are not hidden from this process."""
    hidden = os.environ.get("CUDA_VISIBLE_DEVICES") in ("", "-1")
    return not hidden and Path("/proc/driver/nvidia/version").exists()
