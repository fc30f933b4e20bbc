"""Encoder-decoders: the Transformer, T5 and BART."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from llmtrain.models.encoder_decoder.config import Seq2SeqConfig
from llmtrain.models.encoder_decoder.memory import EncoderDecoderMemory
from llmtrain.models.encoder_decoder.sharding import table
from llmtrain.models.family import Family

if TYPE_CHECKING:
    from torch import nn

    from llmtrain.models.huggingface.form import Form


def _build(config: Seq2SeqConfig) -> nn.Module:
    from llmtrain.models.encoder_decoder.model import EncoderDecoder

    return EncoderDecoder(config)


def _objective(config: Seq2SeqConfig) -> Mapping[str, Any]:
    """Return the objective of T5, BART or the Transformer, according to the kind of positions."""
    kinds = {"relative": "span_corruption", "learned": "denoising", "sinusoidal": "seq2seq"}
    section: dict[str, Any] = {"kind": kinds[config.positions]}
    if section["kind"] == "span_corruption" and config.num_sentinels is not None:
        section["num_sentinels"] = config.num_sentinels
    return section


def _huggingface() -> tuple[Form, ...]:
    from llmtrain.models.encoder_decoder.huggingface import BART, T5

    return T5, BART


FAMILIES = (
    Family(
        Seq2SeqConfig,
        "encoder_decoder",
        _build,
        _objective,
        sharding=table,
        memory=EncoderDecoderMemory,
        has_stages=True,
        huggingface=_huggingface,
    ),
)
