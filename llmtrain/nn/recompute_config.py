"""Config of activation recomputation. Free of torch."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Literal

from llmtrain.config import require
from llmtrain.errors import Problem


@dataclass(frozen=True)
class RecomputeConfig:
    """Activations that the backward pass recomputes instead of keeping them in memory (arXiv:1604.06174)."""

    mode: Literal["none", "selective", "full", "offload"] = "none"
    """none: keep all activations. selective: keep the outputs of linear layers only (arXiv:2205.05198). full:
    keep the inputs of layers only. offload: as full, with the inputs in host memory."""
    every: int = 1
    """Recompute every k-th layer, starting with the first."""

    def problems(self) -> Iterator[Problem]:
        yield from require(self.every >= 1, "every", self.every, "1 or more")

    def covers(self, block: int) -> bool:
        """Return whether the layer of this number is recomputed."""
        return self.mode != "none" and block % self.every == 0
