"""When checkpoints are written, which are kept and where a run resumes, free of torch."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

from llmtrain.config import require
from llmtrain.errors import Problem


@dataclass(frozen=True)
class CheckpointConfig:
    """Checkpoints of a run; one is always written at its last step."""

    every: int | None = 500
    """Steps between checkpoints; null: only the last step's."""
    keep_last: int = 2
    """How many of the newest stay."""
    keep_best: int = 1
    """How many of those with the lowest validation loss stay besides."""
    keep_every: int | None = None
    """Checkpoints at multiples of this many steps stay for good."""
    asynchronous: bool = True
    """Train on while a checkpoint is written, from a copy of the state in host memory; otherwise wait."""
    resume: str = "auto"
    """auto: from the newest good checkpoint of the run folder, if any; never: refuse a folder that has
    some; a path: from that run folder or checkpoint."""

    def problems(self) -> Iterator[Problem]:
        yield from require(self.every is None or self.every >= 1, "every", self.every, "1 or more, or null")
        yield from require(self.keep_last >= 1, "keep_last", self.keep_last, "1 or more")
        yield from require(self.keep_best >= 0, "keep_best", self.keep_best, "0 or more")
        yield from require(
            self.keep_every is None or self.keep_every >= 1,
            "keep_every",
            self.keep_every,
            "1 or more, or null",
        )
