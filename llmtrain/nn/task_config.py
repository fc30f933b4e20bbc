"""Config of the head of a fine-tuning task. Free of torch."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Literal

from llmtrain.config import require
from llmtrain.errors import Problem

Pooling = Literal["first", "last", "mean"]


@dataclass(frozen=True)
class TaskHeadConfig:
    """A head over the hidden states, in place of the language model's. The objective of a fine-tuning task
    sets these keys."""

    kind: Literal["classes", "labels", "values", "tags", "span"]
    """What it predicts. classes: one class a text; labels: any number of labels a text; values: numbers for a
    text; tags: one class a token; span: first and last token of an answer."""
    outputs: int | None = None
    """Number of outputs; null until the labels of the data are known."""
    pooling: Pooling = "first"
    """Hidden state that stands for a text: of its first token, of its last, or their mean."""
    dense: bool = False
    """A linear layer with tanh before the outputs."""
    bias: bool = True
    """Biases of the outputs."""
    dropout: float = 0.1
    """Dropout probability of what the outputs read."""
    encoder_only: bool = False
    """Of an encoder-decoder: the head reads the encoder's hidden states, and there is no decoder; else those
    of the decoder, which reads the text that the encoder reads."""
    labels: tuple[str, ...] = ()
    """Names of the classes, labels or tags, in the order of the outputs."""
    class_weights: tuple[float, ...] = ()
    """Weight of each class in the training loss; empty: 1."""

    def problems(self) -> Iterator[Problem]:
        yield from require(self.outputs is None or self.outputs >= 1, "outputs", self.outputs, "1 or more")
        yield from require(0.0 <= self.dropout < 1.0, "dropout", self.dropout, "0 up to, not including, 1")

    @property
    def num_outputs(self) -> int:
        """Return the number of outputs. Raise ValueError if it is not known yet."""
        if self.outputs is None:
            raise ValueError("the number of outputs is not resolved yet")
        return self.outputs

    def matrix_count(self, hidden_size: int) -> int:
        """Return the weights of the head's matrices."""
        return hidden_size * (self.num_outputs + (hidden_size if self.dense else 0))

    def parameter_count(self, hidden_size: int) -> int:
        """Return the parameters of the head."""
        biases = (self.num_outputs if self.bias else 0) + (hidden_size if self.dense else 0)
        return self.matrix_count(hidden_size) + biases
