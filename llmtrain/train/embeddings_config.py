"""The section `embeddings`: word vectors that a model's embedding starts from. Free of torch."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path


@dataclass(frozen=True)
class EmbeddingsConfig:
    """Word vectors that the embedding starts from, in place of values from the seed."""

    path: Path | None = None
    """A file of word vectors in word2vec's text form; null: none. Each word of the tokenizer takes its
    vector; a table without data.tokenizer is divided into the file's words."""
    freeze: bool = False
    """The embedding keeps its values."""
