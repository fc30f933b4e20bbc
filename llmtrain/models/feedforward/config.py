"""Config of a feedforward network, with its parameter and FLOP counts. Free of torch."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Literal

from llmtrain.config import require
from llmtrain.errors import Problem
from llmtrain.nn.model_config import ModelConfig, Row

Activation = Literal["relu", "sigmoid", "tanh", "gelu"]


@dataclass(frozen=True)
class MLPConfig(ModelConfig):
    """A multilayer perceptron (Rumelhart, Hinton and Williams 1986) that tells classes of images or of the
    rows of a table apart."""

    family: Literal["mlp"] = "mlp"
    """Feedforward classifier."""
    hidden: tuple[int, ...] = (256,)
    """Units of each hidden layer; []: none, which is logistic regression."""
    activation: Activation = "relu"
    """Nonlinearity of the hidden layers."""
    inputs: int | None = None
    """Numbers that it reads; null: those of an image, or as many as the columns of a table give."""
    image_size: int = 28
    """Height and width of the images, in pixels."""
    channels: int = 1
    """Channels of the images: 1 for grey, 3 for color."""
    num_classes: int = 10
    """Number of classes; of a table it follows from the rows."""
    single_output: bool = False
    """One sigmoid unit, the probability of the second of two classes, in place of one unit for each class."""
    dropout: float = 0.0
    """Probability of dropping a hidden unit."""
    start: Literal["he", "small"] = "he"
    """Initial weights. he: uniform with the variance of He et al. (arXiv:1502.01852); small: weights and
    biases uniform ±0.5, from which the fewest networks of few sigmoid units end in a local minimum."""

    def problems(self) -> Iterator[Problem]:
        for i, width in enumerate(self.hidden):
            yield from require(width >= 1, f"hidden[{i}]", width, "1 or more")
        inputs = self.inputs
        yield from require(inputs is None or inputs >= 1, "inputs", inputs, "1 or more, or null")
        yield from require(self.image_size >= 1, "image_size", self.image_size, "1 or more")
        yield from require(self.channels in (1, 3), "channels", self.channels, "1 or 3")
        yield from require(self.num_classes >= 2, "num_classes", self.num_classes, "2 or more")
        if self.single_output:
            yield from require(
                self.num_classes == 2, "single_output", f"true with {self.num_classes} classes", "2"
            )
        yield from require(0.0 <= self.dropout < 1.0, "dropout", self.dropout, "0 up to, not including, 1")

    @property
    def image_shape(self) -> tuple[int, int] | None:
        return None if self.inputs is not None else (self.image_size, self.channels)

    @property
    def sizes(self) -> tuple[int, ...]:
        """Return the units of each layer, inputs and outputs included."""
        inputs = self.channels * self.image_size**2 if self.inputs is None else self.inputs
        return (inputs, *self.hidden, 1 if self.single_output else self.num_classes)

    def _matrices(self) -> list[int]:
        return [a * b for a, b in zip(self.sizes, self.sizes[1:], strict=False)]

    def step_parameter_counts(self, tensor: int = 1) -> list[int]:
        return [sum(self._matrices()) + sum(self.sizes[1:])]

    def largest_parameter_count(self, tensor: int = 1) -> int:
        return max(self._matrices())

    def flops_per_token(self, row: Row) -> float:
        """Return forward and backward FLOPs per image or row, which counts as one token here."""
        return 6.0 * sum(self._matrices())
