"""When to write checkpoints, which to keep, and where to resume. Free of torch."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path

from llmtrain.config import require, require_utf8
from llmtrain.corpus.transport_source import is_http
from llmtrain.errors import Problem
from llmtrain.urls import without_credentials

SHARED_MEMORY = Path("/dev/shm")  # noqa: S108
"""Linux' file system in memory."""
GENERATIONS = 2
"""Copies of the state that memory holds at most: the last whole one, and the one that is being made."""


@dataclass(frozen=True)
class MemoryConfig:
    """Copies of the state in the hosts' own memory and in that of their neighbours. Ranks that a launcher
    starts anew after a failure go on from them."""

    every: int | None = None
    """Steps between two copies; null: none. They are made where a launcher restarts ranks (MAX_RESTARTS)."""
    dir: Path = SHARED_MEMORY
    """Folder for them on each host: of a file system in memory, or of a local NVMe disk; no shared one."""

    def problems(self) -> Iterator[Problem]:
        yield from require(self.every is None or self.every >= 1, "every", self.every, "1 or more, or null")
        yield from require_utf8("dir", self.dir)
        yield from require(self.dir.is_absolute(), "dir", str(self.dir), "an absolute path, such as /dev/shm")

    @property
    def copies(self) -> int:
        """Return how often host memory holds what a rank saves: the buffer that it is written from, and where
        `dir` is in memory, its own generations and those of a neighbour."""
        if self.every is None:
            return 0
        return 1 + (2 * GENERATIONS if self.dir.is_relative_to(SHARED_MEMORY) else 0)


@dataclass(frozen=True)
class CheckpointConfig:
    """Checkpoints of a run; one is always written at the last step."""

    every: int | None = 500
    """Steps between checkpoints; null: only at the last step."""
    keep_last: int = 2
    """Number of newest checkpoints to keep."""
    keep_best: int = 1
    """Number of checkpoints with the best validation figures to keep in addition."""
    best: str | None = None
    """Figure by which checkpoints are the best, such as `f1_macro`; one is then also written at each
    evaluation that is the best so far. null: `early_stopping.metric`, or else the loss."""
    keep_every: int | None = None
    """Keep all checkpoints at multiples of this number of steps; null: none for this reason."""
    asynchronous: bool = True
    """Whether to continue training while a checkpoint is written from a copy of the state in host memory."""
    resume: str = "auto"
    """Checkpoint to resume from. auto: the newest undamaged one of the run folder, if any; never: none, and
    refuse a run folder with checkpoints; a path: that run folder or checkpoint."""
    remote: str | None = None
    """URL of a folder where checkpoints, metrics and events of the run are copied behind training: s3://…,
    gs://…, file:///… or another scheme of fsspec. A run whose own folder has none, or an older one, goes on
    with the newest checkpoint there. null: none."""
    remote_verify: bool = True
    """Read each uploaded file back and compare its checksum; false: compare its size alone."""
    memory: MemoryConfig = field(default_factory=MemoryConfig)
    """Copies of the state in memory, between checkpoints."""

    def problems(self) -> Iterator[Problem]:
        is_url = self.remote is None or ("://" in self.remote and not is_http(self.remote))
        shown = None if self.remote is None else without_credentials(self.remote)
        yield from require(
            is_url, "remote", shown, "a URL such as s3://bucket/run, file:///disk/run, or null"
        )
        yield from require(self.every is None or self.every >= 1, "every", self.every, "1 or more, or null")
        yield from require(self.keep_last >= 1, "keep_last", self.keep_last, "1 or more")
        yield from require(self.keep_best >= 0, "keep_best", self.keep_best, "0 or more")
        yield from require(
            self.keep_every is None or self.keep_every >= 1,
            "keep_every",
            self.keep_every,
            "1 or more, or null",
        )
