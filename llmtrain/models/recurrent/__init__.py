"""Recurrent networks: language models, and readers of whole texts for tasks."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from llmtrain.models.family import Family
from llmtrain.models.recurrent.config import GRUConfig, LSTMConfig, RecurrentConfig, RNNConfig
from llmtrain.models.recurrent.memory import RecurrentMemory

if TYPE_CHECKING:
    from torch import nn


def _build(config: RecurrentConfig) -> nn.Module:
    from llmtrain.models.recurrent.model import RecurrentModel

    return RecurrentModel(config)


def _objective(config: RecurrentConfig) -> Mapping[str, Any]:
    return {"kind": "classification" if config.reads_whole_texts else "causal_lm"}


FAMILIES = tuple(
    Family(config, "decoder", _build, _objective, memory=RecurrentMemory)
    for config in (RNNConfig, GRUConfig, LSTMConfig)
)
