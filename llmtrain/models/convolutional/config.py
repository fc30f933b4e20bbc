"""Config of a convolutional network, with its parameter and FLOP counts. Free of torch."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Literal

from llmtrain.config import require
from llmtrain.errors import Problem
from llmtrain.nn.model_config import ModelConfig, Row


@dataclass(frozen=True)
class SimpleCNNConfig(ModelConfig):
    """Two convolutions and two linear layers for 28×28 digits (in the style of LeNet, LeCun et al. 1998)."""

    family: Literal["simple_cnn"] = "simple_cnn"
    """Convolutional image classifier."""
    num_classes: int = 10
    """Number of classes."""
    dropout: float = 0.0

    def problems(self) -> Iterator[Problem]:
        yield from require(self.num_classes >= 2, "num_classes", self.num_classes, "2 or more")
        yield from require(0.0 <= self.dropout < 1.0, "dropout", self.dropout, "0 up to, not including, 1")

    def step_parameter_counts(self, tensor: int = 1) -> list[int]:
        """Return all parameters as one step: convolutions 1→32 and 32→64 (both 3×3), linear layers 3136→128
        and 128→classes, each with a bias."""
        C = self.num_classes
        return [(9 * 32 + 32) + (9 * 32 * 64 + 64) + (3136 * 128 + 128) + (128 * C + C)]

    def largest_parameter_count(self, tensor: int = 1) -> int:
        return 128 * max(3136, self.num_classes)

    def flops_per_token(self, row: Row) -> float:
        """Return forward and backward FLOPs per image, which counts as one token here."""
        convolutions = 28 * 28 * 9 * 32 + 14 * 14 * 9 * 32 * 64
        return 6.0 * (convolutions + 3136 * 128 + 128 * self.num_classes)
