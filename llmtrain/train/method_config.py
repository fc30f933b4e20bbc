"""Configuration of the methods of fine-tuning, without torch."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Literal

from llmtrain.config import require
from llmtrain.errors import Problem

Method = Literal["full", "features", "gradual", "lora", "adapter", "prefix", "prompt", "bitfit"]


@dataclass(frozen=True)
class GradualConfig:
    """Unfreezing from the top (ULMFiT, arXiv:1801.06146, section 3.3), with method=gradual."""

    every: int | None = None
    """Steps until one more layer trains, from the top, and at last the embeddings; null: the run is divided
    evenly."""

    def problems(self) -> Iterator[Problem]:
        yield from require(self.every is None or self.every >= 1, "every", self.every, "1 or more, or null")
