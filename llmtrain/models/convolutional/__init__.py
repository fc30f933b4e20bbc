"""Convolutional networks."""

from __future__ import annotations

from typing import TYPE_CHECKING

from llmtrain.models.convolutional.config import SimpleCNNConfig
from llmtrain.models.convolutional.memory import SimpleCNNMemory
from llmtrain.models.family import Family

if TYPE_CHECKING:
    from torch import nn


def _simple_cnn(config: SimpleCNNConfig) -> nn.Module:
    from llmtrain.models.convolutional.model import SimpleCNN

    return SimpleCNN(config)


FAMILIES = (
    Family(
        SimpleCNNConfig,
        "classifier",
        _simple_cnn,
        lambda config: {"kind": "image_classification"},
        memory=SimpleCNNMemory,
    ),
)
