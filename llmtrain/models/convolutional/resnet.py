"""Residual networks (He et al. 2015, arXiv:1512.03385).

Dim names: B batch, C classes, D channels of the last stage; image tensors have channels, height and width.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from llmtrain.models.convolutional.resnet_config import EXPANSION, ResNetConfig
from llmtrain.nn.batch_norm import BatchNorm
from llmtrain.nn.initialize import Constant, Initializer, Normal, Uniform
from llmtrain.nn.linear import Linear


class Convolution(nn.Module):
    """A convolution without bias, and batch norm."""

    def __init__(self, inputs: int, outputs: int, side: int, stride: int, synchronized: bool) -> None:
        super().__init__()
        self.convolution = nn.Conv2d(inputs, outputs, side, stride, padding=side // 2, bias=False)
        self.norm = BatchNorm(outputs, synchronized)

    def forward(self, x: Tensor) -> Tensor:
        normalized: Tensor = self.norm(self.convolution(x))
        return normalized


class Block(nn.Module):
    """F.relu(x + f(x)), where f is two or three convolutions (figure 5). A bottleneck halves the size in its
    3×3 convolution, as torchvision and transformers do, where the paper does so in the first 1×1."""

    def __init__(self, config: ResNetConfig, inputs: int, outputs: int, stride: int) -> None:
        super().__init__()
        synchronized = config.synchronized_norm
        if config.block == "basic":
            shapes = [(inputs, outputs, 3, stride), (outputs, outputs, 3, 1)]
        else:
            inner = outputs // EXPANSION
            shapes = [(inputs, inner, 1, 1), (inner, inner, 3, stride), (inner, outputs, 1, 1)]
        self.convolutions = nn.ModuleList(Convolution(*shape, synchronized) for shape in shapes)
        self.shortcut: Convolution | None = None
        self.stride, self.added = stride, outputs - inputs
        if config.shortcut == "projection" and (stride != 1 or inputs != outputs):
            self.shortcut = Convolution(inputs, outputs, 1, stride, synchronized)

    def forward(self, x: Tensor) -> Tensor:
        y = x
        for i, convolution in enumerate(self.convolutions):
            y = convolution(F.relu(y) if i else y)
        return F.relu(y + self._shortcut(x))

    def _shortcut(self, x: Tensor) -> Tensor:
        if self.shortcut is not None:
            projected: Tensor = self.shortcut(x)
            return projected
        if self.stride == 1 and not self.added:
            return x
        return F.pad(x[:, :, :: self.stride, :: self.stride], (0, 0, 0, 0, 0, self.added))


class ResNet(nn.Module):
    """A stem, stages of blocks, the mean over all pixels, and a linear layer."""

    def __init__(self, config: ResNetConfig) -> None:
        super().__init__()
        self.config = config
        is_large = config.stem == "imagenet"
        side, stride = (7, 2) if is_large else (3, 1)
        self.stem = Convolution(config.channels, config.stem_width, side, stride, config.synchronized_norm)
        self.pool = nn.MaxPool2d(3, 2, padding=1) if is_large else nn.Identity()
        self.stages = nn.ModuleList()
        inputs = config.stem_width
        for stage, (depth, width) in enumerate(zip(config.depths, config.widths, strict=True)):
            strides = [2 if stage else 1, *[1] * (depth - 1)]
            widths = [inputs, *[width] * (depth - 1)]
            blocks = (Block(config, *each) for each in zip(widths, [width] * depth, strides, strict=True))
            self.stages.append(nn.Sequential(*blocks))
            inputs = width
        self.head = Linear(inputs, config.num_classes)

    def forward(
        self, images_BCHW: Tensor, labels_B: Tensor | None = None, dropout_keys_B: Tensor | None = None
    ) -> Tensor:
        """Return logits (B, C) of images (B, channels, height, width); with labels, the SUM of cross-entropy
        in nats over labels other than -100, 0-d fp32. There is no dropout for the keys to decide."""
        logits_BC = self.logits(self.features(images_BCHW))
        if labels_B is None:
            return logits_BC
        return F.cross_entropy(logits_BC.float(), labels_B, reduction="sum")

    def features(self, images_BCHW: Tensor) -> Tensor:
        """Return what the last layer reads, (B, D)."""
        # Convolutions keep this order of a pixel's channels, in which they are up to twice as fast on CPUs.
        # It is made by a copy: torch takes images of one channel for being in both orders at once.
        images_BCHW = torch.empty_like(images_BCHW, memory_format=torch.channels_last).copy_(images_BCHW)
        x = self.pool(F.relu(self.stem(images_BCHW)))
        for stage in self.stages:
            x = stage(x)
        mean_BD: Tensor = x.mean((2, 3))
        return mean_BD

    def logits(self, features_BD: Tensor) -> Tensor:
        """Return logits (B, C) of features (B, D)."""
        logits_BC: Tensor = self.head(features_BD)
        return logits_BC

    def initializers(self) -> dict[str, Initializer]:
        """Return the initial values:

        | parameter            | value                                                        |
        |----------------------|--------------------------------------------------------------|
        | convolutions         | normal, variance 2 / (outputs · kernel) (arXiv:1502.01852, eq. 14) |
        | norms                | weight 1, bias 0, running mean 0, running variance 1          |
        | head, n inputs       | uniform ±1 / √n, weights and bias                             |
        """
        table: dict[str, Initializer] = {
            f"{each.name}.convolution.weight": Normal((2 / (each.outputs * each.side**2)) ** 0.5)
            for each in self.config.convolutions()
        }
        for part, value in (("weight", 1.0), ("bias", 0.0), ("running_mean", 0.0), ("running_var", 1.0)):
            table[f"*.norm.{part}"] = Constant(value)
        return {**table, "head.*": Uniform(self.config.widths[-1] ** -0.5)}
