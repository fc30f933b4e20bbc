"""With how many hosts an elastic job can go on, asked before anything is started."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import NamedTuple

from llmtrain.distributed.folders import run_folder
from llmtrain.distributed.hosts import Hosts
from llmtrain.errors import ConfigError, Problem
from llmtrain.files import expand_home

PROGRAM = "llmtrain.cli.elastic"
"""Module that composes the configuration for a launcher."""


def elastic_bounds(hosts: Hosts, overrides: Sequence[str]) -> Callable[[int], bool]:
    """Return a function that tells whether a job on so many hosts has a layout. All hosts are taken to have
    as many processes as this one.

    Raise ConfigError if the configuration is wrong, or the least number of hosts has no layout.
    """
    if not hosts.is_elastic:
        return lambda num_nodes: True
    import torch

    each = hosts.num_processes or max(1, torch.accelerator.device_count())
    sizes = {num_nodes: num_nodes * each for num_nodes in range(hosts.least, hosts.num_nodes + 1)}
    done = _compose(",".join(map(str, sizes.values())), overrides)
    if done.returncode:
        got = f"a configuration that cannot be read ({' '.join(done.stderr.split())[-300:]})"
        raise ConfigError(Problem("NNODES", got, remedy="run llmtrain train with these overrides to see why"))
    said = json.loads(done.stdout)
    if said["problems"]:
        raise ConfigError(Problem(**problem) for problem in said["problems"])
    refused: dict[str, str] = said["refused"]
    fitting = [num_nodes for num_nodes, size in sizes.items() if str(size) not in refused]
    if hosts.least not in fitting:
        size = sizes[hosts.least]
        plural = "process" if size == 1 else "processes"
        got = f"{hosts.least}:{hosts.num_nodes}, but no layout fits {size} {plural}"
        allowed = f"MIN among {', '.join(map(str, fitting))}" if fitting else "bounds with a layout; none has"
        remedy = f"name the axes that may shrink in parallel.elastic ({refused[str(size)]})"
        raise ConfigError(Problem("NNODES", got, allowed, remedy))
    return lambda num_nodes: num_nodes in fitting


class Folders(NamedTuple):
    """The folders of a run that a launcher needs to know."""

    run: Path
    memory: Path | None
    """Where each host keeps copies of the state in memory; None: nowhere."""
    has_copy_elsewhere: bool = False
    """True if checkpoints are also copied to a store (checkpoint.remote)."""


def composed_folders(overrides: Sequence[str]) -> Folders:
    """Return the folders that the composed configuration has, as a preset may set them.

    Where nothing can be composed, return what the text of the overrides selects: the ranks report the
    mistake.
    """
    done = _compose("", overrides)
    said = json.loads(done.stdout) if done.returncode == 0 else {}
    run, memory = said.get("run_dir"), said.get("memory_dir")
    return Folders(
        run_folder(overrides) if run is None else expand_home(run).absolute(),
        None if memory is None else expand_home(memory).absolute(),
        said.get("remote") is not None,
    )


def _compose(sizes: str, overrides: Sequence[str]) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", PROGRAM, sizes, *overrides]
    return subprocess.run(command, capture_output=True, text=True)  # noqa: S603
