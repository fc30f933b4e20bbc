"""Generators that are trained against discriminators."""

from __future__ import annotations

from typing import TYPE_CHECKING

from llmtrain.models.adversarial.config import GANConfig
from llmtrain.models.adversarial.memory import GANMemory
from llmtrain.models.family import Family

if TYPE_CHECKING:
    from torch import nn


def _gan(config: GANConfig) -> nn.Module:
    from llmtrain.models.adversarial.model import GAN

    return GAN(config)


FAMILIES = (Family(GANConfig, "generator", _gan, lambda config: {"kind": "adversarial"}, memory=GANMemory),)
