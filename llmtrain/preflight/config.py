"""The configuration of `llmtrain preflight`, without torch."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

from llmtrain.config import require
from llmtrain.errors import Problem


@dataclass(frozen=True)
class RunFolderConfig:
    """The run that is to start."""

    dir: Path = Path(".")
    """Folder of the run, whose disk must have room; it need not exist yet."""


@dataclass(frozen=True)
class RoomConfig:
    """What must be free on every host."""

    memory_bytes: int = 2_000_000_000
    """Memory of the host that no program uses."""
    run_bytes: int = 2_000_000_000
    """Bytes on the disk of the run folder."""
    tmp_bytes: int = 1_000_000_000
    """Bytes in the folder for temporary files, /tmp or TMPDIR."""
    shm_bytes: int = 100_000_000
    """Bytes in /dev/shm, which NCCL and data workers need; containers get 64 MB unless they ask for more."""

    def problems(self) -> Iterator[Problem]:
        for name, value in vars(self).items():
            yield from require(value >= 0, name, value, "0 or more")


@dataclass(frozen=True)
class PreflightConfig:
    run: RunFolderConfig = field(default_factory=RunFolderConfig)
    device: Literal["auto", "cpu", "cuda"] = "auto"
    """What computes: auto takes a GPU where there is one."""
    factor: float = 1.5
    """A rank, host or link is off that is slower than the median by this factor."""
    seconds: float = 1.0
    """Seconds that one measurement takes; there are six to twelve of them."""
    link_bytes: int | None = None
    """Bytes of a message between ranks; null: 32 MiB between CPUs, 256 MiB between GPUs."""
    clock_seconds: float = 1.0
    """A host is off whose clock differs by more than this from the others."""
    room: RoomConfig = field(default_factory=RoomConfig)
    output: Path | None = None
    """File for all figures as one JSON object; null: none."""
    cluster_output: Path | None = None
    """File for the figures as a cluster for `llmtrain plan cluster=…`, a .yaml; null: none."""

    def problems(self) -> Iterator[Problem]:
        yield from require(self.factor > 1, "factor", self.factor, "more than 1", "such as factor=1.3")
        yield from require(0 < self.seconds <= 5, "seconds", self.seconds, "more than 0, at most 5")
        size = self.link_bytes
        yield from require(size is None or 4 <= size <= 2**32, "link_bytes", size, "4 to 4 GiB, or null")
        yield from require(self.clock_seconds > 0, "clock_seconds", self.clock_seconds, "more than 0")
        named = self.cluster_output is None or self.cluster_output.suffix == ".yaml"
        yield from require(named, "cluster_output", str(self.cluster_output), "a name with .yaml")


@dataclass(frozen=True)
class CalibrateConfig:
    output: Path
    """The cluster file, NAME.yaml. In a folder FOLDER/cluster it is chosen by `--config-dir FOLDER
    cluster=NAME`."""
    device: Literal["auto", "cpu", "cuda"] = "auto"
    """What is measured: auto takes a GPU where there is one."""
    processes: int | None = None
    """Processes that compute at once on this machine, as those of a run do; null: one for each GPU, or 1. The
    links are measured between two at least."""
    seconds: float = 0.5
    """Seconds that one measurement takes; there are about fifteen."""
    overwrite: bool = False
    """Replace a file."""

    def problems(self) -> Iterator[Problem]:
        named = self.output.suffix == ".yaml"
        yield from require(named, "output", str(self.output), "a name with .yaml")
        count = self.processes
        yield from require(count is None or 1 <= count <= 1024, "processes", count, "1 to 1024, or null")
        yield from require(0 < self.seconds <= 5, "seconds", self.seconds, "more than 0, at most 5")
