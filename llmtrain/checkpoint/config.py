"""When to write checkpoints, which to keep, and where to resume. Free of torch."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

from llmtrain.config import require
from llmtrain.corpus.transport_source import is_http
from llmtrain.errors import Problem
from llmtrain.urls import without_credentials


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
