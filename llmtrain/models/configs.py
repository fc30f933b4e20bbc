"""All families' configs, free of torch."""

from __future__ import annotations

from llmtrain.models.bert_config import BertConfig
from llmtrain.models.config import GPTConfig, LSTMConfig, SimpleCNNConfig
from llmtrain.models.seq2seq_config import Seq2SeqConfig
from llmtrain.models.xlnet_config import XLNetConfig

TransformerConfig = GPTConfig | BertConfig | XLNetConfig | Seq2SeqConfig
"""Those with blocks of attention, which tensor parallelism, pipelines and recomputation divide and repeat;
each has the same arithmetic."""

ModelConfig = TransformerConfig | LSTMConfig | SimpleCNNConfig
