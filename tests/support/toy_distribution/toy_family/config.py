"""What describes a toy language model, with its arithmetic. Free of torch."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Literal

from llmtrain.config import require
from llmtrain.errors import Problem
from llmtrain.nn.model_config import OfVocabulary, Row


@dataclass(frozen=True)
class ToyConfig(OfVocabulary):
    """A decoder in which each token sees the mean of the tokens up to it."""

    family: Literal["toy"] = "toy"
    """A family outside the package."""
    vocab_size: int | None = None
    """Rows of the embedding; null takes the corpus' vocabulary."""
    hidden_size: int = 32
    tie_embeddings: bool = True
    dropout: float = 0.0
    init_std: float = 0.02

    def problems(self) -> Iterator[Problem]:
        yield from self.vocabulary_problems()
        yield from require(self.hidden_size >= 1, "hidden_size", self.hidden_size, "1 or more")
        yield from require(0.0 <= self.dropout < 1.0, "dropout", self.dropout, "0 up to, not including, 1")

    def step_parameter_counts(self, tensor: int = 1) -> list[int]:
        embeddings = 1 if self.tie_embeddings else 2
        return [embeddings * self.embedding_count() + self.hidden_size**2]

    def largest_parameter_count(self, tensor: int = 1) -> int:
        return max(self._vocab(), self.hidden_size) * self.hidden_size

    def flops_per_token(self, row: Row) -> float:
        return 6.0 * (self.embedding_count() + self.hidden_size**2)
