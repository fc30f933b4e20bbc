"""Tiny models of the forms that transformers has, with random weights; a folder of one, and its import."""

from __future__ import annotations

from dataclasses import replace

import torch
from torch import Tensor, nn

from llmtrain.models.encoder_decoder.config import Seq2SeqConfig
from llmtrain.models.encoder_decoder.model import EncoderDecoder
from llmtrain.models.gpt.config import GPTConfig
from llmtrain.models.gpt.model import GPT
from llmtrain.nn.rope_config import RopeScaling

GPT2 = GPTConfig(
    vocab_size=320, hidden_size=32, num_layers=2, num_heads=4, max_sequence_length=16, dropout=0.1
)

LLAMA = replace(
    GPT2,
    num_kv_heads=2,
    mlp_hidden_size=48,
    positions="rope",
    norm="rmsnorm",
    gated_mlp=True,
    activation="silu",
    bias=False,
    tie_embeddings=False,
    rope_theta=500_000.0,
)

FORMS = {
    "gpt2": GPT2,
    "gpt2-untied": replace(GPT2, tie_embeddings=False, activation="gelu", mlp_hidden_size=40),
    "llama": LLAMA,
    "llama-tied-bias": replace(LLAMA, tie_embeddings=True, bias=True, num_kv_heads=None),
    "llama-3.1": replace(LLAMA, rope_scaling=RopeScaling(original_max_sequence_length=4), head_dim=16),
}


def weights(config: GPTConfig | Seq2SeqConfig) -> dict[str, Tensor]:
    model = GPT(config) if isinstance(config, GPTConfig) else EncoderDecoder(config)
    return random_weights(model)


def random_weights(model: nn.Module) -> dict[str, Tensor]:
    """Of every parameter: biases and norms start alike everywhere, and a mix-up would not show."""
    generator = torch.Generator().manual_seed(0)
    return {name: torch.randn(p.shape, generator=generator) for name, p in model.named_parameters()}
