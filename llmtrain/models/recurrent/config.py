"""Configs of recurrent networks, with their parameter and FLOP counts. Free of torch."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import ClassVar, Literal

from llmtrain.adapt.config import Adaptation
from llmtrain.config import INTERNAL, require
from llmtrain.errors import Problem
from llmtrain.nn.model_config import OfVocabulary, Row
from llmtrain.nn.task_config import TaskHeadConfig

Attention = Literal["additive", "dot", "multi_head"]


@dataclass(frozen=True)
class RecurrentConfig(OfVocabulary):
    """What all recurrent networks have in common: an embedding, layers of one kind of cell, a head.

    Read from the left, it is a language model; read from both sides, or with attention over all tokens, it
    carries the head of a task alone.
    """

    gates: ClassVar[int]
    """Blocks of hidden_size rows in a cell's matrices."""

    vocab_size: int | None = None
    """Rows of the embedding; null: the corpus' vocabulary."""
    hidden_size: int = 256
    """Width of the hidden state, for each direction."""
    num_layers: int = 2
    embedding_size: int | None = None
    """Width of the embedding; null: hidden_size."""
    bidirectional: bool = False
    """Each layer also reads the text from its end (Schuster and Paliwal, 1997); only with the head of a
    task."""
    attention: Attention | None = None
    """What stands for a text, in place of objective.pooling: a mean of its hidden states, weighed by
    attention; only with the head of a task over texts. additive: scores by a small network (Yang et al.,
    NAACL 2016); dot: by the product with the final state (Luong et al., arXiv:1508.04025); multi_head: by
    heads whose query is the final state (arXiv:1706.03762)."""
    attention_heads: int = 4
    """Heads of attention=multi_head."""
    tie_embeddings: bool = True
    """The language model's head shares the embedding's weight."""
    dropout: float = 0.0
    """Dropout probability between layers, and before the first and after the last."""
    task: TaskHeadConfig | None = field(default=None, metadata={INTERNAL: True})
    """Head of a fine-tuning task, in place of the language model's; set by the objective."""
    adaptation: Adaptation | None = field(default=None, metadata={INTERNAL: True})
    """What fine-tuning adds to the layers; set by the method."""

    def problems(self) -> Iterator[Problem]:
        yield from require(self.hidden_size >= 1, "hidden_size", self.hidden_size, "1 or more")
        yield from require(self.num_layers >= 1, "num_layers", self.num_layers, "1 or more")
        yield from require(0.0 <= self.dropout < 1.0, "dropout", self.dropout, "0 up to, not including, 1")
        width = self.embedding_width
        yield from require(width >= 1, "embedding_size", width, "1 or more, or null")
        if self.attention == "multi_head":
            heads, allowed = self.attention_heads, f"a divisor of {self.output_width}, the width of a state"
            fits = heads >= 1 and self.output_width % heads == 0
            yield from require(fits, "attention_heads", heads, allowed)
        if self.attention is not None and self.task is not None and not self.task.is_of_whole_texts:
            got = f"{self.attention} with a head over {self.task.kind}"
            yield Problem("attention", got, "null, or a task over whole texts", "leave it out")

    def token_head_problems(self) -> Iterator[Problem]:
        remedy = "give the objective of a task, such as classification"
        if self.bidirectional:
            allowed = "false with a language model, which must not see what it predicts"
            yield Problem("bidirectional", "true", allowed, remedy)
        if self.attention is not None:
            yield Problem("attention", self.attention, "null with a language model", remedy)
        if self.tie_embeddings and self.embedding_width != self.hidden_size:
            allowed = f"hidden_size={self.hidden_size}, or null, with tie_embeddings=true"
            yield Problem(
                "embedding_size", str(self.embedding_size), allowed, "set model.tie_embeddings=false"
            )

    @property
    def embedding_key(self) -> str:
        return "embedding_size"

    @property
    def embedding_width(self) -> int:
        return self.hidden_size if self.embedding_size is None else self.embedding_size

    @property
    def output_width(self) -> int:
        """Return the width of the hidden states that a head reads."""
        return self.hidden_size * self.directions

    @property
    def directions(self) -> int:
        return 2 if self.bidirectional else 1

    @property
    def reads_whole_texts(self) -> bool:
        """Return whether a hidden state depends on later tokens."""
        return self.bidirectional or self.attention is not None

    @property
    def carries_states(self) -> bool:
        return not self.reads_whole_texts

    @property
    def state_width(self) -> int:
        """Return the numbers of the states of all layers after a token; LSTMs have a cell beside each."""
        return self.num_layers * self.hidden_size * (2 if self.gates == 4 else 1)

    @property
    def weighs_tokens(self) -> bool:
        return self.attention is not None

    @property
    def input_widths(self) -> list[int]:
        """Return the width of what each layer reads."""
        return [self.embedding_width, *[self.output_width] * (self.num_layers - 1)]

    def head_matrix_count(self, tensor: int = 1) -> int:
        if self.task is not None:
            return super().head_matrix_count()
        return self._vocab() * self.hidden_size

    def embedding_count(self, tensor: int = 1) -> int:
        return self._vocab() * self.embedding_width

    @property
    def layer_matrix_count(self) -> int:
        """Return the weights of all layers without biases."""
        D = self.hidden_size
        return sum(self.directions * self.gates * D * (width + D) for width in self.input_widths)

    @property
    def layer_parameter_count(self) -> int:
        """Return the parameters of all layers."""
        biases = self.num_layers * self.directions * 2 * self.gates * self.hidden_size
        return self.layer_matrix_count + biases

    @property
    def attention_matrix_count(self) -> int:
        """Return the weights of the attention over the states, without biases."""
        W = self.output_width
        counts = {None: 0, "dot": 0, "additive": W * W + W, "multi_head": 4 * W * W}
        return counts[self.attention]

    @property
    def attention_parameter_count(self) -> int:
        """Return the parameters of the attention over the states."""
        biases = {None: 0, "dot": 0, "additive": 1, "multi_head": 4}
        return self.attention_matrix_count + biases[self.attention] * self.output_width

    def step_parameter_counts(self, tensor: int = 1) -> list[int]:
        """Return all parameters as one step, with a tied head counted once. Needs vocab_size."""
        has_own_head = self.task is not None or not self.tie_embeddings
        head = self.head_parameter_count() if has_own_head else 0
        of_layers = self.layer_parameter_count + self.attention_parameter_count
        return [self.embedding_count() + of_layers + head]

    def largest_parameter_count(self, tensor: int = 1) -> int:
        of_layers = self.gates * self.hidden_size * max(*self.input_widths, self.hidden_size)
        return max(self.embedding_count(), of_layers)

    def flops_per_token(self, row: Row) -> float:
        """Return forward and backward FLOPs per token, which do not depend on the sequence length."""
        share = 1.0 if self.task is None else row.predicted / row.tokens
        return 6.0 * (
            self.layer_matrix_count + self.attention_matrix_count + share * self.head_matrix_count()
        )


@dataclass(frozen=True)
class RNNConfig(RecurrentConfig):
    """The plain recurrent network (Elman, 1990)."""

    gates: ClassVar = 1

    family: Literal["rnn"] = "rnn"
    """Plain recurrent network."""
    nonlinearity: Literal["tanh", "relu"] = "tanh"
    """What is applied to the sum of input and state; relu: as in Le et al. (arXiv:1504.00941)."""


@dataclass(frozen=True)
class GRUConfig(RecurrentConfig):
    """Gated recurrent units (Cho et al., arXiv:1406.1078)."""

    gates: ClassVar = 3

    family: Literal["gru"] = "gru"
    """Gated recurrent units."""


@dataclass(frozen=True)
class LSTMConfig(RecurrentConfig):
    """Long short-term memory; without options the language model of Zaremba et al. (arXiv:1409.2329)."""

    gates: ClassVar = 4

    family: Literal["lstm"] = "lstm"
    """Long short-term memory."""
