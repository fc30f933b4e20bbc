"""XLNet: an encoder that predicts tokens in any order."""

from __future__ import annotations

from typing import TYPE_CHECKING

from llmtrain.models.family import Family, Filling, PooledHead
from llmtrain.models.xlnet.config import XLNetConfig
from llmtrain.models.xlnet.memory import XLNetMemory
from llmtrain.models.xlnet.sharding import table

if TYPE_CHECKING:
    from torch import nn

    from llmtrain.models.huggingface.form import Form
    from llmtrain.tokenizers.base import Frame, Tokenizer


def _build(config: XLNetConfig) -> nn.Module:
    from llmtrain.models.xlnet.model import XLNet

    return XLNet(config)


def _filling(config: XLNetConfig, tokenizer: Tokenizer) -> Filling:
    """Put <sep> and <cls> after the prompt, as XLNet's tokenizer does."""
    own = tokenizer.special_ids
    is_own = {"sep", "cls"} <= own.keys()
    return Filling(None, [], [own["sep"], own["cls"]] if is_own else [tokenizer.eos_id])


def _frame(config: XLNetConfig, tokenizer: Tokenizer) -> Frame:
    """Return A <sep> <cls> and A <sep> B <sep> <cls>, with eos in place of what the tokenizer lacks."""
    from llmtrain.tokenizers.base import Frame, Template

    own = tokenizer.special_ids
    sep_id, cls_id = own.get("sep", tokenizer.eos_id), own.get("cls", tokenizer.eos_id)
    one = Template((), (), (sep_id, cls_id), (), (), (0, 2))
    return Frame(one, Template((), (sep_id,), (sep_id, cls_id), (), (0,), (1, 2)))


def _huggingface() -> tuple[Form, ...]:
    from llmtrain.models.xlnet.huggingface import XLNET

    return (XLNET,)


FAMILIES = (
    Family(
        XLNetConfig,
        "permuted_encoder",
        _build,
        lambda config: {"kind": "permuted_lm"},
        sharding=table,
        memory=XLNetMemory,
        has_stages=True,
        huggingface=_huggingface,
        filling=_filling,
        frame=_frame,
        pooled=PooledHead("last", dense=True),
    ),
)
