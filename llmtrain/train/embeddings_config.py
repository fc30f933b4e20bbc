"""The section `embeddings`: word vectors that a model's embedding starts from. Free of torch."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path


@dataclass(frozen=True)
class EmbeddingsConfig:
    """Word vectors that the embedding starts from, in place of values from the seed."""

    path: Path | None = None
    """A run of word vectors, one of its checkpoints, or a file in any form that `llmtrain vectors import`
    reads; null: none. Each word of the tokenizer takes its vector; a table without data.tokenizer is divided
    into the file's words."""
    freeze: bool = False
    """The embedding keeps its values."""
