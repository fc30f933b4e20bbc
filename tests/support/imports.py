"""A small Llama, and the import of a Hugging Face folder."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from llmtrain.checkpoint.reader import Checkpoint
from llmtrain.checkpoint.retention import find
from llmtrain.commands import import_
from llmtrain.models.gpt.config import GPTConfig

LLAMA = GPTConfig(
    vocab_size=512,
    hidden_size=32,
    num_layers=2,
    num_heads=4,
    num_kv_heads=2,
    max_sequence_length=64,
    mlp_hidden_size=48,
    positions="rope",
    norm="rmsnorm",
    gated_mlp=True,
    activation="silu",
    bias=False,
)


def run(source: Path, output: Path, **settings: Any) -> Checkpoint:
    import_.run({"source": str(source), "output": str(output), **settings})
    return find(output, print)
