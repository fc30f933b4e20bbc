"""A small convolutional classifier (in the style of LeNet, LeCun et al. 1998).

Dim names: B batch, C classes, D hidden width; image tensors have channels, height and width.
"""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor, nn

from llmtrain.models.convolutional.config import SimpleCNNConfig
from llmtrain.nn.dropout import HIDDEN, Dropout
from llmtrain.nn.initialize import Initializer, Uniform
from llmtrain.nn.linear import Linear


class SimpleCNN(nn.Module):
    """conv channels→32, pool, conv 32→64, pool, fc → 128 → classes."""

    def __init__(self, config: SimpleCNNConfig) -> None:
        super().__init__()
        self.config = config
        self.conv1 = nn.Conv2d(config.channels, 32, kernel_size=3, padding=1)
        self.conv2 = nn.Conv2d(32, 64, kernel_size=3, padding=1)
        self.fc1 = Linear(config.pooled, 128)
        self.fc2 = Linear(128, config.num_classes)
        self.dropout = Dropout(config.dropout, 0, HIDDEN)

    def forward(
        self, images_BCHW: Tensor, labels_B: Tensor | None = None, dropout_keys_B: Tensor | None = None
    ) -> Tensor:
        """Return logits (B, C) of images (B, channels, height, width); with labels, the SUM of cross-entropy
        in nats over labels other than -100, 0-d fp32. Dropout masks are generated from dropout_keys_B; None:
        by torch's generator."""
        x_BD = self.features(images_BCHW)
        # Dropout treats an image as a sequence of one token.
        x_BD = self.dropout(x_BD[:, None], dropout_keys_B)[:, 0]
        logits_BC = self.logits(x_BD)
        if labels_B is None:
            return logits_BC
        return F.cross_entropy(logits_BC.float(), labels_B, reduction="sum")

    def features(self, images_BCHW: Tensor) -> Tensor:
        """Return what the last layer reads, (B, D)."""
        x = F.max_pool2d(F.relu(self.conv1(images_BCHW)), 2)
        x = F.max_pool2d(F.relu(self.conv2(x)), 2)
        return F.relu(self.fc1(x.flatten(1)))

    def logits(self, features_BD: Tensor) -> Tensor:
        """Return logits (B, C) of features (B, D)."""
        logits_BC: Tensor = self.fc2(features_BD)
        return logits_BC

    def initializers(self) -> dict[str, Initializer]:
        """Return torch's default: Kaiming uniform (arXiv:1502.01852) with a = sqrt(5), biases likewise.

        | parameter             | value                                           |
        |-----------------------|-------------------------------------------------|
        | weights and biases    | uniform ±1/sqrt(inputs of one output; of digits 9, 288, 3136, 128) |
        """
        inputs = {"conv1": 9 * self.config.channels, "conv2": 9 * 32, "fc1": self.config.pooled, "fc2": 128}
        return {f"{name}.*": Uniform(n**-0.5) for name, n in inputs.items()}
