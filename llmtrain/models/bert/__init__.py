"""BERT and RoBERTa: bidirectional encoders."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from llmtrain.models.bert.config import BertConfig
from llmtrain.models.bert.memory import BertMemory
from llmtrain.models.bert.sharding import table
from llmtrain.models.family import Family, Filling, PooledHead

if TYPE_CHECKING:
    from torch import nn

    from llmtrain.models.huggingface.form import Form
    from llmtrain.tokenizers.base import Frame, Tokenizer


def _build(config: BertConfig) -> nn.Module:
    from llmtrain.models.bert.model import Bert

    return Bert(config)


def _objective(config: BertConfig) -> Mapping[str, Any]:
    """Return masked language modeling, with sentence pairs if the model has a head or segments for them."""
    has_pairs = config.num_segments >= 2 if config.pair_head is None else config.pair_head
    return {"kind": "mlm", "pairs": "next_sentence" if has_pairs else "none"}


def _filling(config: BertConfig, tokenizer: Tokenizer) -> Filling:
    """Put [CLS] before a prompt if the model was trained with it, which a [CLS] in the tokenizer
    indicates."""
    mask_id, cls_id, sep_id = config.special_ids
    has_cls = config.pair_head or tokenizer.special_ids.get("cls") == cls_id
    return Filling(mask_id, [cls_id], [sep_id]) if has_cls else Filling(mask_id, [], [tokenizer.eos_id])


def _frame(config: BertConfig, tokenizer: Tokenizer) -> Frame:
    """Return [CLS] A [SEP] and [CLS] A [SEP] B [SEP]."""
    from llmtrain.tokenizers.base import Frame, Template

    _, cls_id, sep_id = config.special_ids
    one = Template((cls_id,), (), (sep_id,), (0,), (), (0,))
    return Frame(one, Template((cls_id,), (sep_id,), (sep_id,), (0,), (0,), (1,)))


def _huggingface() -> tuple[Form, ...]:
    from llmtrain.models.bert.huggingface import BERT, ROBERTA

    return BERT, ROBERTA


FAMILIES = (
    Family(
        BertConfig,
        "encoder",
        _build,
        _objective,
        sharding=table,
        memory=BertMemory,
        has_stages=True,
        huggingface=_huggingface,
        filling=_filling,
        frame=_frame,
        pooled=PooledHead("first", dense=True),
        aliases={"head.dense": "pooler", "token_head": "head"},
    ),
)
