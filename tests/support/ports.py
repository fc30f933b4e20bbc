"""Free ports for tests, no two of which get the same one, whatever process or checkout they run in."""

from __future__ import annotations

import fcntl
import os
import random
import socket
import tempfile
from pathlib import Path
from typing import IO

_RANGE = range(10_000, 17_000)
"""Below the ports that the kernel gives to outgoing connections, which would take a free one at any time."""
_SLURM = range(17_100, 18_000, 3)
"""First ports of a test cluster; ports of its jobs follow from it."""
_CLAIMS: list[IO[str]] = []
"""Locked files of the ports of this process, until it ends."""


def free_port() -> int:
    """Return a port that is free, and stays this process's own."""
    return free_ports(1, random.SystemRandom().sample(_RANGE, 200))


def free_cluster_ports() -> int:
    """Return the first of three free ports for a Slurm cluster."""
    return free_ports(3, list(_SLURM))


def free_ports(count: int, firsts: list[int]) -> int:
    """Return the first of `count` ports in a row that are free, of those that begin at one of `firsts`."""
    for first in firsts:
        if all(_is_free(port) for port in range(first, first + count)) and _claim(first):
            return first
    raise AssertionError("no free port")


def _is_free(port: int) -> bool:
    with socket.socket() as probe:
        try:
            probe.bind(("127.0.0.1", port))
        except OSError:
            return False
    return True


def _claim(port: int) -> bool:
    folder = Path(tempfile.gettempdir(), f"llmtrain-test-ports-{os.getuid()}")
    folder.mkdir(exist_ok=True)
    file = (folder / str(port)).open("w")
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError:
        file.close()
        return False
    _CLAIMS.append(file)
    return True
