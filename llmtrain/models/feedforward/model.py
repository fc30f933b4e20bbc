"""A multilayer perceptron (Rumelhart, Hinton and Williams 1986).

Dim names: B batch, I inputs, D units of a hidden layer, C classes.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from llmtrain.models.feedforward.config import MLPConfig
from llmtrain.nn.dropout import HIDDEN, Dropout
from llmtrain.nn.initialize import Constant, Initializer, Uniform
from llmtrain.nn.linear import Linear

ACTIVATIONS: dict[str, Callable[[Tensor], Tensor]] = {
    "relu": F.relu,
    "sigmoid": torch.sigmoid,
    "tanh": torch.tanh,
    "gelu": F.gelu,
}


class MLP(nn.Module):
    """x_{l+1} = f(W_l x_l + b_l); the last layer is linear and gives logits."""

    def __init__(self, config: MLPConfig) -> None:
        super().__init__()
        self.config = config
        pairs = zip(config.sizes, config.sizes[1:], strict=False)
        self.layers = nn.ModuleList(Linear(inputs, outputs) for inputs, outputs in pairs)
        self.dropouts = nn.ModuleList(Dropout(config.dropout, i, HIDDEN) for i in range(len(config.hidden)))

    def forward(
        self, inputs: Tensor, labels_B: Tensor | None = None, dropout_keys_B: Tensor | None = None
    ) -> Tensor:
        """Return logits (B, C) of images (B, channels, height, width) or rows (B, I); with labels, the SUM of
        cross-entropy in nats over labels other than -100, 0-d fp32. Dropout masks are generated from
        dropout_keys_B; None: by torch's generator."""
        activate = ACTIVATIONS[self.config.activation]
        x_BD = inputs.flatten(1)
        for layer, dropout in zip(self.layers, self.dropouts, strict=False):
            # Dropout treats a row as a sequence of one token.
            x_BD = dropout(activate(layer(x_BD))[:, None], dropout_keys_B)[:, 0]
        logits_BC = self.layers[-1](x_BD)
        if self.config.single_output:
            # The softmax of 0 and z is the sigmoid of z.
            logits_BC = torch.cat([torch.zeros_like(logits_BC), logits_BC], 1)
        if labels_B is None:
            return logits_BC
        return F.cross_entropy(logits_BC.float(), labels_B, reduction="sum")

    def initializers(self) -> dict[str, Initializer]:
        """Return the initial values, of a layer of n inputs:

        | parameter | start=he (arXiv:1502.01852, eq. 10) | start=small  |
        |-----------|-------------------------------------|--------------|
        | weights   | uniform ±√(6 / n)                   | uniform ±0.5 |
        | biases    | 0                                   | uniform ±0.5 |
        """
        table: dict[str, Initializer] = {}
        for i, inputs in enumerate(self.config.sizes[:-1]):
            if self.config.start == "small":
                table[f"layers.{i}.*"] = Uniform(0.5)
            else:
                table[f"layers.{i}.weight"] = Uniform((6 / inputs) ** 0.5)
                table[f"layers.{i}.bias"] = Constant(0.0)
        return table
