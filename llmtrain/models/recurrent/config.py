"""Config of an LSTM language model, with its parameter and FLOP counts. Free of torch."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Literal

from llmtrain.adapt.config import Adaptation
from llmtrain.config import INTERNAL, require
from llmtrain.errors import Problem
from llmtrain.nn.model_config import OfVocabulary, Row
from llmtrain.nn.task_config import TaskHeadConfig


@dataclass(frozen=True)
class LSTMConfig(OfVocabulary):
    """An LSTM language model (Zaremba et al., arXiv:1409.2329)."""

    family: Literal["lstm"] = "lstm"
    """Recurrent language model."""
    vocab_size: int | None = None
    """Rows of the embedding; null: the corpus' vocabulary."""
    hidden_size: int = 256
    num_layers: int = 2
    tie_embeddings: bool = True
    dropout: float = 0.0
    task: TaskHeadConfig | None = field(default=None, metadata={INTERNAL: True})
    """Head of a fine-tuning task, in place of the language model's; set by the objective."""
    adaptation: Adaptation | None = field(default=None, metadata={INTERNAL: True})
    """What fine-tuning adds to the layers; set by the method."""

    def problems(self) -> Iterator[Problem]:
        yield from require(self.hidden_size >= 1, "hidden_size", self.hidden_size, "1 or more")
        yield from require(self.num_layers >= 1, "num_layers", self.num_layers, "1 or more")
        yield from require(0.0 <= self.dropout < 1.0, "dropout", self.dropout, "0 up to, not including, 1")

    def step_parameter_counts(self, tensor: int = 1) -> list[int]:
        """Return all parameters as one step, with a tied head counted once. Needs vocab_size."""
        V, D = self._vocab(), self.hidden_size
        head = self.head_parameter_count() if self.task is not None or not self.tie_embeddings else 0
        return [V * D + self.num_layers * (8 * D * D + 8 * D) + head]

    def largest_parameter_count(self, tensor: int = 1) -> int:
        return max(self._vocab(), 4 * self.hidden_size) * self.hidden_size

    def flops_per_token(self, row: Row) -> float:
        """Return forward and backward FLOPs per token, which do not depend on the sequence length."""
        share = 1.0 if self.task is None else row.predicted / row.tokens
        return 6.0 * (self.num_layers * 8 * self.hidden_size**2 + share * self.head_matrix_count())
