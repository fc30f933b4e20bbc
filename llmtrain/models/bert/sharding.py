"""How tensor parallelism divides a BERT."""

from __future__ import annotations

from llmtrain.models.bert.config import BertConfig
from llmtrain.nn.sharding import LAYERS, Table, vocabulary


def table(config: BertConfig) -> Table:
    """Return name pattern → role."""
    return {**vocabulary(config), **LAYERS}
