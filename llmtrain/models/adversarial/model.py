"""A generator and a discriminator (Goodfellow et al. 2014, arXiv:1406.2661), of linear layers or of
convolutions (DCGAN, Radford et al. 2015, arXiv:1511.06434).

Dim names: B batch, Z latent_size; image tensors have channels, height and width.
"""

from __future__ import annotations

from itertools import pairwise

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from llmtrain.models.adversarial.config import GANConfig
from llmtrain.nn.batch_norm import BatchNorm
from llmtrain.nn.dropout import HIDDEN, Dropout
from llmtrain.nn.initialize import Constant, Initializer, Normal, Uniform
from llmtrain.nn.linear import Linear

SLOPE = 0.2
"""Slope of the leaky ReLU for negative inputs (DCGAN, section 3)."""


class LinearGenerator(nn.Module):
    """Leaky ReLU between linear layers, and tanh at the end."""

    def __init__(self, config: GANConfig) -> None:
        super().__init__()
        self.config = config
        sizes = (config.latent_size, *config.hidden, config.numbers)
        self.layers = nn.ModuleList(Linear(a, b) for a, b in pairwise(sizes))

    def forward(self, noise_BZ: Tensor) -> Tensor:
        x = noise_BZ
        for i, layer in enumerate(self.layers):
            x = layer(F.leaky_relu(x, SLOPE) if i else x)
        size = self.config.image_size
        return torch.tanh(x).view(-1, self.config.channels, size, size)


class LinearDiscriminator(nn.Module):
    """Leaky ReLU and dropout between linear layers."""

    def __init__(self, config: GANConfig) -> None:
        super().__init__()
        sizes = (config.numbers, *reversed(config.hidden), 1)
        self.layers = nn.ModuleList(Linear(a, b) for a, b in pairwise(sizes))
        self.dropouts = nn.ModuleList(Dropout(config.dropout, i, HIDDEN) for i in range(len(config.hidden)))

    def forward(self, images: Tensor, keys_B: Tensor | None = None) -> Tensor:
        x = images.flatten(1)
        for layer, dropout in zip(self.layers, self.dropouts, strict=False):
            x = dropout(F.leaky_relu(layer(x), SLOPE)[:, None], keys_B)[:, 0]
        score_B1: Tensor = self.layers[-1](x)
        return score_B1[:, 0]


class ConvolutionalGenerator(nn.Module):
    """A linear layer, and transposed convolutions of stride 2, each but the last with batch norm and ReLU;
    tanh at the end."""

    def __init__(self, config: GANConfig) -> None:
        super().__init__()
        self.config = config
        widths = config.widths
        self.start = Linear(config.latent_size, widths[0] * config.sides[0] ** 2)
        self.layers = nn.ModuleList(nn.ConvTranspose2d(a, b, 4, 2, padding=1) for a, b in pairwise(widths))
        self.norms = nn.ModuleList(BatchNorm(width, config.synchronized_norm) for width in widths[:-1])

    def forward(self, noise_BZ: Tensor) -> Tensor:
        side = self.config.sides[0]
        x = self.start(noise_BZ).view(-1, self.config.widths[0], side, side)
        for norm, layer in zip(self.norms, self.layers, strict=True):
            x = layer(F.relu(norm(x)))
        return torch.tanh(x)


class ConvolutionalDiscriminator(nn.Module):
    """Convolutions of stride 2 with leaky ReLU, each but the first with batch norm; a linear layer at the
    end."""

    def __init__(self, config: GANConfig) -> None:
        super().__init__()
        widths = config.widths[::-1]
        self.layers = nn.ModuleList(nn.Conv2d(a, b, 4, 2, padding=1) for a, b in pairwise(widths))
        with_norm = widths[2:] if config.discriminator_norm == "batch" else ()
        self.norms = nn.ModuleList(BatchNorm(width, config.synchronized_norm) for width in with_norm)
        self.end = Linear(widths[-1] * config.sides[0] ** 2, 1)

    def forward(self, images: Tensor, keys_B: Tensor | None = None) -> Tensor:
        x = images
        for i, layer in enumerate(self.layers):
            x = layer(x)
            if i and len(self.norms):
                x = self.norms[i - 1](x)
            x = F.leaky_relu(x, SLOPE)
        score_B1: Tensor = self.end(x.flatten(1))
        return score_B1[:, 0]


class GAN(nn.Module):
    """Both networks. Their objective trains them against each other."""

    def __init__(self, config: GANConfig) -> None:
        super().__init__()
        self.config = config
        self.generator: nn.Module
        self.discriminator: nn.Module
        if config.layers == "linear":
            self.generator, self.discriminator = LinearGenerator(config), LinearDiscriminator(config)
        else:
            self.generator = ConvolutionalGenerator(config)
            self.discriminator = ConvolutionalDiscriminator(config)

    def forward(self, noise_BZ: Tensor) -> Tensor:
        """Return images (B, channels, height, width) of values from -1 to 1."""
        images: Tensor = self.generator(noise_BZ)
        return images

    def score(self, images: Tensor, keys_B: Tensor | None = None) -> Tensor:
        """Return how real the discriminator finds images, as the logit of a probability, (B,).
        keys_B: of dropout, as `nn.dropout.Dropout` takes them."""
        score_B: Tensor = self.discriminator(images, keys_B)
        return score_B

    def initializers(self) -> dict[str, Initializer]:
        """Return the initial values, of a linear layer of n inputs:

        | parameter | linear                     | convolutional (DCGAN, section 4)     |
        |-----------|----------------------------|--------------------------------------|
        | weights   | uniform ±1/√n, torch's own | normal, 0.02                         |
        | biases    | 0                          | 0                                    |
        | norms     |                            | weight 1, bias 0, mean 0, variance 1 |
        """
        config = self.config
        if config.layers == "linear":
            table: dict[str, Initializer] = {"*.bias": Constant(0.0)}
            generator = (config.latent_size, *config.hidden)
            discriminator = (config.numbers, *reversed(config.hidden))
            for part, sizes in (("generator", generator), ("discriminator", discriminator)):
                for i, inputs in enumerate(sizes):
                    table[f"{part}.layers.{i}.weight"] = Uniform(inputs**-0.5)
            return table
        table = {f"*.layers.{i}.weight": Normal(0.02) for i in range(len(config.sides) - 1)}
        table |= {"*.start.weight": Normal(0.02), "*.end.weight": Normal(0.02), "*.bias": Constant(0.0)}
        for part, value in (("weight", 1.0), ("running_mean", 0.0), ("running_var", 1.0)):
            table[f"*.norms.*.{part}"] = Constant(value)
        return table
