"""Config of a generator and a discriminator, with their parameter and FLOP counts. Free of torch."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from itertools import pairwise
from typing import Literal, NamedTuple

from llmtrain.config import require
from llmtrain.errors import Problem
from llmtrain.nn.model_config import ModelConfig, Row

SMALLEST = 4
"""Least height and width at which the convolutions of a generator begin."""


class Layer(NamedTuple):
    """A layer of a generator or a discriminator."""

    inputs: int
    outputs: int
    weights: int
    positions: int
    """Number of places of an image at which each weight is applied."""
    has_norm: bool


@dataclass(frozen=True)
class GANConfig(ModelConfig):
    """A generator of images and a discriminator (Goodfellow et al. 2014, arXiv:1406.2661), of linear layers
    or of convolutions (DCGAN, Radford et al. 2015, arXiv:1511.06434)."""

    family: Literal["gan"] = "gan"
    """Generator and discriminator."""
    layers: Literal["linear", "convolutional"] = "linear"
    """Kind of the layers of generator and discriminator."""
    latent_size: int = 100
    """Numbers of the noise that the generator begins with."""
    hidden: tuple[int, ...] = (256, 512)
    """Units of the generator's hidden layers, and in reverse of the discriminator's (linear)."""
    width: int = 64
    """Channels at half the image's size, doubled at each halving (convolutional)."""
    discriminator_norm: Literal["batch", "none"] = "batch"
    """Norm of the discriminator's convolutions but the first; none: as the gradient penalty needs it."""
    image_size: int = 28
    """Height and width of the images, in pixels."""
    channels: int = 1
    """Channels of the images: 1 for grey, 3 for color."""
    num_classes: int = 10
    """Classes of the images, which are not learned."""
    synchronized_norm: bool = True
    """Batch norms take mean and variance over the micro-batches of all replicas; false: each over its own."""
    dropout: float = 0.0
    """Dropout probability after the discriminator's hidden layers (linear)."""

    def problems(self) -> Iterator[Problem]:
        yield from require(self.latent_size >= 1, "latent_size", self.latent_size, "1 or more")
        for i, width in enumerate(self.hidden):
            yield from require(width >= 1, f"hidden[{i}]", width, "1 or more")
        yield from require(self.width >= 1, "width", self.width, "1 or more")
        yield from require(self.channels in (1, 3), "channels", self.channels, "1 or 3")
        yield from require(self.image_size >= 1, "image_size", self.image_size, "1 or more")
        if self.layers == "convolutional" and self.image_size >= 1:
            allowed = f"an even number from {2 * SMALLEST} on"
            yield from require(len(self.sides) > 1, "image_size", self.image_size, allowed)
        yield from require(0.0 <= self.dropout < 1.0, "dropout", self.dropout, "0 up to, not including, 1")

    @property
    def numbers(self) -> int:
        """Return the numbers of an image."""
        return self.channels * self.image_size**2

    @property
    def sides(self) -> tuple[int, ...]:
        """Return heights of the images between the layers of convolutions, the smallest first."""
        sides = [self.image_size]
        while sides[0] % 2 == 0 and sides[0] // 2 >= SMALLEST:
            sides.insert(0, sides[0] // 2)
        return tuple(sides)

    @property
    def widths(self) -> tuple[int, ...]:
        """Return the channels at each of `sides`."""
        halvings = len(self.sides) - 1
        return (*(self.width * 2 ** (halvings - 1 - i) for i in range(halvings)), self.channels)

    def layer_list(self) -> Iterator[Layer]:
        """Yield the layers of the generator and of the discriminator."""
        if self.layers == "linear":
            for sizes in (
                (self.latent_size, *self.hidden, self.numbers),
                (self.numbers, *reversed(self.hidden), 1),
            ):
                for inputs, outputs in pairwise(sizes):
                    yield Layer(inputs, outputs, inputs * outputs, 1, False)
            return
        start = self.widths[0] * self.sides[0] ** 2
        yield Layer(self.latent_size, start, self.latent_size * start, 1, False)
        pairs = list(pairwise(self.widths))
        for i, (inputs, outputs) in enumerate(pairs):
            # Each input pixel meets each weight once.
            yield Layer(inputs, outputs, 16 * inputs * outputs, self.sides[i] ** 2, i + 1 < len(pairs))
        for i, (outputs, inputs) in reversed(list(enumerate(pairs))):
            has_norm = self.discriminator_norm == "batch" and i + 1 < len(pairs)
            yield Layer(inputs, outputs, 16 * inputs * outputs, self.sides[i] ** 2, has_norm)
        yield Layer(start, 1, start, 1, False)

    def _norms(self) -> int:
        """Return the channels of all batch norms."""
        of_start = self.widths[0] if self.layers == "convolutional" else 0
        return of_start + sum(layer.outputs for layer in self.layer_list() if layer.has_norm)

    def step_parameter_counts(self, tensor: int = 1) -> list[int]:
        return [sum(layer.weights + layer.outputs for layer in self.layer_list()) + 2 * self._norms()]

    def statistics_count(self) -> int:
        return 2 * self._norms()

    def largest_parameter_count(self, tensor: int = 1) -> int:
        return max(layer.weights for layer in self.layer_list())

    def flops_per_token(self, row: Row) -> float:
        """Return forward and backward FLOPs per real image: both networks in the generator's turn, and the
        discriminator twice in its own."""
        layers = list(self.layer_list())
        half = len(layers) // 2
        generator, discriminator = (
            sum(layer.weights * layer.positions for layer in part) for part in (layers[:half], layers[half:])
        )
        return 6.0 * (generator + 3 * discriminator) + 2.0 * generator
