"""Encoder-decoders: the Transformer, T5 and BART."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from llmtrain.models.encoder_decoder.config import Seq2SeqConfig
from llmtrain.models.encoder_decoder.memory import EncoderDecoderMemory
from llmtrain.models.encoder_decoder.sharding import table
from llmtrain.models.family import Family, PooledHead

if TYPE_CHECKING:
    from torch import nn

    from llmtrain.models.huggingface.form import Form
    from llmtrain.tokenizers.base import Frame, Tokenizer


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


def _frame(config: Seq2SeqConfig, tokenizer: Tokenizer) -> Frame:
    """Return A </s> and A </s> B </s>."""
    from llmtrain.tokenizers.base import Frame, Template

    eos_id = tokenizer.eos_id if config.eos_id is None else config.eos_id
    one = Template((), (), (eos_id,), (), (), (0,))
    return Frame(one, Template((), (eos_id,), (eos_id,), (), (0,), (0,)))


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
        frame=_frame,
        pooled=PooledHead("last", dense=True),
    ),
)
