"""All families' configs, free of torch."""

from __future__ import annotations

from llmtrain.models.bert.config import BertConfig
from llmtrain.models.convolutional.config import SimpleCNNConfig
from llmtrain.models.encoder_decoder.config import Seq2SeqConfig
from llmtrain.models.gpt.config import GPTConfig
from llmtrain.models.recurrent.config import LSTMConfig
from llmtrain.models.xlnet.config import XLNetConfig

TransformerConfig = GPTConfig | BertConfig | XLNetConfig | Seq2SeqConfig
"""Those with blocks of attention, which tensor parallelism, pipelines and recomputation divide and repeat;
each has the same arithmetic."""

ModelConfig = TransformerConfig | LSTMConfig | SimpleCNNConfig
