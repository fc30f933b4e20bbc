"""The recurrent encoder-decoder with attention."""

from __future__ import annotations

from typing import TYPE_CHECKING

from llmtrain.models.family import Family
from llmtrain.models.recurrent_seq2seq.config import RecurrentSeq2SeqConfig
from llmtrain.models.recurrent_seq2seq.memory import RecurrentSeq2SeqMemory

if TYPE_CHECKING:
    from torch import nn


def _build(config: RecurrentSeq2SeqConfig) -> nn.Module:
    from llmtrain.models.recurrent_seq2seq.model import RecurrentSeq2Seq

    return RecurrentSeq2Seq(config)


FAMILIES = (
    Family(
        RecurrentSeq2SeqConfig,
        "encoder_decoder",
        _build,
        lambda config: {"kind": "seq2seq"},
        memory=RecurrentSeq2SeqMemory,
    ),
)
