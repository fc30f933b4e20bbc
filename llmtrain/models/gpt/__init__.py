"""GPT and related decoders: GPT-2, Llama, Mistral, Qwen, Gemma, OLMo."""

from __future__ import annotations

from typing import TYPE_CHECKING

from llmtrain.models.family import Family, PooledHead
from llmtrain.models.gpt.config import GPTConfig
from llmtrain.models.gpt.memory import GPTMemory
from llmtrain.models.gpt.sharding import table

if TYPE_CHECKING:
    from torch import nn

    from llmtrain.models.huggingface.form import Form


def _build(config: GPTConfig) -> nn.Module:
    from llmtrain.models.gpt.model import GPT

    return GPT(config)


def _huggingface() -> tuple[Form, ...]:
    from llmtrain.models.gpt.huggingface import FORMS

    return FORMS


FAMILIES = (
    Family(
        GPTConfig,
        "decoder",
        _build,
        lambda config: {"kind": "causal_lm"},
        sharding=table,
        memory=GPTMemory,
        has_stages=True,
        shares_sequences=True,
        huggingface=_huggingface,
        pooled=PooledHead("last", bias=False),
    ),
)
