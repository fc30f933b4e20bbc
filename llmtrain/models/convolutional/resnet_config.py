"""Config of a residual network, with its parameter and FLOP counts. Free of torch."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Literal, NamedTuple

from llmtrain.config import require
from llmtrain.errors import Problem
from llmtrain.nn.model_config import ModelConfig, Row

EXPANSION = 4
"""Output channels of a bottleneck over those of its 3×3 convolution."""


class Convolution(NamedTuple):
    """A convolution without bias, and the batch norm behind it."""

    name: str
    """Module of the model that has both."""
    inputs: int
    outputs: int
    side: int
    """Height and width of its kernel."""
    size: int
    """Height and width of its output."""

    @property
    def weights(self) -> int:
        return self.inputs * self.outputs * self.side**2


@dataclass(frozen=True)
class ResNetConfig(ModelConfig):
    """A residual network (He et al. 2015, arXiv:1512.03385): for large pictures (table 1), or for those of
    CIFAR (section 4.2)."""

    family: Literal["resnet"] = "resnet"
    """Residual convolutional classifier."""
    block: Literal["basic", "bottleneck"] = "basic"
    """basic: two 3×3 convolutions; bottleneck: 1×1, 3×3 and 1×1."""
    depths: tuple[int, ...] = (2, 2, 2, 2)
    """Blocks of each stage."""
    widths: tuple[int, ...] = (64, 128, 256, 512)
    """Output channels of each stage; each but the first halves height and width."""
    stem: Literal["imagenet", "cifar"] = "imagenet"
    """Layers before the stages. imagenet: a 7×7 convolution and a max pool, each of stride 2; cifar: a 3×3
    convolution."""
    stem_width: int = 64
    """Output channels of the stem."""
    shortcut: Literal["projection", "padding"] = "projection"
    """Where a block changes the shape: a 1×1 convolution (option B), or every other pixel, padded with
    channels of zeros (option A)."""
    image_size: int = 224
    """Height and width of the images, in pixels."""
    channels: int = 3
    """Channels of the images: 1 for grey, 3 for color."""
    num_classes: int = 1000
    """Number of classes."""
    synchronized_norm: bool = True
    """Batch norms take mean and variance over the micro-batches of all replicas; false: each over its own.
    The running averages are those of all replicas either way."""
    dropout: float = 0.0
    """0: residual networks have none."""

    @property
    def image_shape(self) -> tuple[int, int]:
        return self.image_size, self.channels

    def problems(self) -> Iterator[Problem]:
        yield from require(len(self.depths) >= 1, "depths", list(self.depths), "one stage or more")
        same = len(self.depths) == len(self.widths)
        yield from require(same, "widths", list(self.widths), f"{len(self.depths)}, one for each stage")
        for key, values in (("depths", self.depths), ("widths", self.widths)):
            for i, value in enumerate(values):
                yield from require(value >= 1, f"{key}[{i}]", value, "1 or more")
        if self.block == "bottleneck":
            for i, width in enumerate(self.widths):
                allowed = f"a multiple of {EXPANSION}"
                yield from require(width % EXPANSION == 0, f"widths[{i}]", width, allowed)
        yield from require(self.stem_width >= 1, "stem_width", self.stem_width, "1 or more")
        smallest = 2 ** (len(self.depths) - 1) * (4 if self.stem == "imagenet" else 1)
        yield from require(self.image_size >= smallest, "image_size", self.image_size, f"{smallest} or more")
        yield from require(self.channels in (1, 3), "channels", self.channels, "1 or 3")
        yield from require(self.num_classes >= 2, "num_classes", self.num_classes, "2 or more")
        yield from require(self.dropout == 0.0, "dropout", self.dropout, "0")

    def convolutions(self) -> Iterator[Convolution]:
        """Yield all convolutions in the order of the forward pass."""
        size, inputs = self.image_size, self.stem_width
        if self.stem == "imagenet":
            size = -(-size // 2)
            yield Convolution("stem", self.channels, inputs, 7, size)
            size = -(-size // 2)
        else:
            yield Convolution("stem", self.channels, inputs, 3, size)
        for stage, (depth, width) in enumerate(zip(self.depths, self.widths, strict=True)):
            for i in range(depth):
                before, block = size, f"stages.{stage}.{i}"
                if stage > 0 and i == 0:
                    size = -(-size // 2)
                if self.block == "basic":
                    yield Convolution(f"{block}.convolutions.0", inputs, width, 3, size)
                    yield Convolution(f"{block}.convolutions.1", width, width, 3, size)
                else:
                    inner = width // EXPANSION
                    yield Convolution(f"{block}.convolutions.0", inputs, inner, 1, before)
                    yield Convolution(f"{block}.convolutions.1", inner, inner, 3, size)
                    yield Convolution(f"{block}.convolutions.2", inner, width, 1, size)
                if self.shortcut == "projection" and (inputs != width or size != before):
                    yield Convolution(f"{block}.shortcut", inputs, width, 1, size)
                inputs = width

    def step_parameter_counts(self, tensor: int = 1) -> list[int]:
        """Return all parameters as one step: convolutions without bias, two for each channel of a norm, and
        the last layer."""
        of_stages = sum(each.weights + 2 * each.outputs for each in self.convolutions())
        return [of_stages + (self.widths[-1] + 1) * self.num_classes]

    def statistics_count(self) -> int:
        """Return the running means and variances of the batch norms."""
        return sum(2 * each.outputs for each in self.convolutions())

    def largest_parameter_count(self, tensor: int = 1) -> int:
        return max(*(each.weights for each in self.convolutions()), self.widths[-1] * self.num_classes)

    def flops_per_token(self, row: Row) -> float:
        """Return forward and backward FLOPs per image, which counts as one token here."""
        of_stages = sum(each.weights * each.size**2 for each in self.convolutions())
        return 6.0 * (of_stages + self.widths[-1] * self.num_classes)
