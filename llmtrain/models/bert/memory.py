"""Memory of a BERT on one rank. Free of torch."""

from __future__ import annotations

from llmtrain.models.bert.config import BertConfig
from llmtrain.nn.memory import LayersMemory


class BertMemory(LayersMemory[BertConfig]):
    """Attention sees the whole row; the head reads all tokens."""

    causal = False
