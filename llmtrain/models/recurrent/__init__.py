"""Recurrent networks."""

from __future__ import annotations

from typing import TYPE_CHECKING

from llmtrain.models.family import Family
from llmtrain.models.recurrent.config import LSTMConfig
from llmtrain.models.recurrent.memory import LSTMMemory

if TYPE_CHECKING:
    from torch import nn


def _lstm(config: LSTMConfig) -> nn.Module:
    from llmtrain.models.recurrent.model import LSTMLanguageModel

    return LSTMLanguageModel(config)


FAMILIES = (Family(LSTMConfig, "decoder", _lstm, lambda config: {"kind": "causal_lm"}, memory=LSTMMemory),)
