"""Convolutional networks."""

from __future__ import annotations

from typing import TYPE_CHECKING

from llmtrain.models.convolutional.config import SimpleCNNConfig
from llmtrain.models.convolutional.memory import SimpleCNNMemory
from llmtrain.models.convolutional.resnet_config import ResNetConfig
from llmtrain.models.convolutional.resnet_memory import ResNetMemory
from llmtrain.models.family import Family

if TYPE_CHECKING:
    from torch import nn

    from llmtrain.models.huggingface.form import Form


def _simple_cnn(config: SimpleCNNConfig) -> nn.Module:
    from llmtrain.models.convolutional.model import SimpleCNN

    return SimpleCNN(config)


def _resnet(config: ResNetConfig) -> nn.Module:
    from llmtrain.models.convolutional.resnet import ResNet

    return ResNet(config)


def _resnet_forms() -> tuple[Form, ...]:
    from llmtrain.models.convolutional.huggingface import RESNET

    return (RESNET,)


FAMILIES = (
    Family(
        SimpleCNNConfig,
        "classifier",
        _simple_cnn,
        lambda config: {"kind": "image_classification"},
        memory=SimpleCNNMemory,
    ),
    Family(
        ResNetConfig,
        "classifier",
        _resnet,
        lambda config: {"kind": "image_classification"},
        memory=ResNetMemory,
        huggingface=_resnet_forms,
    ),
)
