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
    """Two convolutions and two linear layers, for digits and other small pictures (in the style of LeNet,
    LeCun et al. 1998)."""

    family: Literal["simple_cnn"] = "simple_cnn"
    """Convolutional image classifier."""
    num_classes: int = 10
    """Number of classes."""
    image_size: int = 28
    """Height and width of the images, in pixels."""
    channels: int = 1
    """Channels of the images: 1 for grey, 3 for color."""
    dropout: float = 0.0

    @property
    def image_shape(self) -> tuple[int, int]:
        return self.image_size, self.channels

    def problems(self) -> Iterator[Problem]:
        yield from require(self.num_classes >= 2, "num_classes", self.num_classes, "2 or more")
        yield from require(self.image_size >= 4, "image_size", self.image_size, "4 or more")
        yield from require(self.channels in (1, 3), "channels", self.channels, "1 or 3")
        yield from require(0.0 <= self.dropout < 1.0, "dropout", self.dropout, "0 up to, not including, 1")

    @property
    def pooled(self) -> int:
        """Return the numbers of the second pool, which the linear layers read: 3,136 of 28×28 pixels."""
        return 64 * (self.image_size // 4) ** 2

    def step_parameter_counts(self, tensor: int = 1) -> list[int]:
        """Return all parameters as one step: convolutions channels→32 and 32→64 (both 3×3), linear layers
        pooled→128 and 128→classes, each with a bias."""
        C = self.num_classes
        convolutions = (9 * self.channels * 32 + 32) + (9 * 32 * 64 + 64)
        return [convolutions + (self.pooled * 128 + 128) + (128 * C + C)]

    def largest_parameter_count(self, tensor: int = 1) -> int:
        return max(128 * max(self.pooled, self.num_classes), 9 * 32 * 64)

    def flops_per_token(self, row: Row) -> float:
        """Return forward and backward FLOPs per image, which counts as one token here."""
        size = self.image_size
        convolutions = size**2 * 9 * self.channels * 32 + (size // 2) ** 2 * 9 * 32 * 64
        return 6.0 * (convolutions + self.pooled * 128 + 128 * self.num_classes)
