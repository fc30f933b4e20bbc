"""Feedforward networks."""

from __future__ import annotations

from typing import TYPE_CHECKING

from llmtrain.models.family import Family
from llmtrain.models.feedforward.config import MLPConfig
from llmtrain.models.feedforward.memory import MLPMemory

if TYPE_CHECKING:
    from torch import nn


def _mlp(config: MLPConfig) -> nn.Module:
    from llmtrain.models.feedforward.model import MLP

    return MLP(config)


FAMILIES = (
    Family(MLPConfig, "classifier", _mlp, lambda config: {"kind": "image_classification"}, memory=MLPMemory),
)
