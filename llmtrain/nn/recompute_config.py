"""What trades computation for memory, free of torch."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Literal

from llmtrain.config import require
from llmtrain.errors import Problem


@dataclass(frozen=True)
class RecomputeConfig:
    """What the backward pass computes again instead of finding it kept (arXiv:1604.06174)."""

    mode: Literal["none", "selective", "full", "offload"] = "none"
    """selective: all but the outputs of linear layers (arXiv:2205.05198); full: whole blocks from their
    inputs; offload: as full, with the inputs kept in host memory."""
    every: int = 1
    """Recompute every k-th layer, from the first on."""

    def problems(self) -> Iterator[Problem]:
        yield from require(self.every >= 1, "every", self.every, "1 or more")

    def covers(self, block: int) -> bool:
        """Whether the model's block of this number is recomputed."""
        return self.mode != "none" and block % self.every == 0
