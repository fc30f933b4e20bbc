"""Config of the head of a fine-tuning task. Free of torch."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import Literal

from llmtrain.config import require
from llmtrain.errors import Problem

Pooling = Literal["first", "last", "mean"]


@dataclass(frozen=True)
class TaskHeadConfig:
    """A head over the hidden states, in place of the language model's. The objective of a fine-tuning task
    sets these keys."""

    kind: Literal["classes", "labels", "values", "tags", "span", "tokens", "several"]
    """What it predicts. classes: one class a text; labels: any number of labels a text; values: numbers for a
    text; tags: one class a token; span: first and last token of an answer; several: what each of several
    heads predicts, of which one may be tokens, masked ones, by the head of the language model."""
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

    names: tuple[str, ...] = ()
    """Of several: the names of the tasks."""
    heads: tuple[TaskHeadConfig, ...] = ()
    """Of several: the head of each task."""
    uncertain: bool = False
    """Of several: a learned variance weighs each task's loss."""

    def problems(self) -> Iterator[Problem]:
        yield from require(self.outputs is None or self.outputs >= 1, "outputs", self.outputs, "1 or more")
        yield from require(0.0 <= self.dropout < 1.0, "dropout", self.dropout, "0 up to, not including, 1")

    @property
    def is_of_vocabulary(self) -> bool:
        """Return whether it is the head of the language model, as one of several."""
        return self.kind == "tokens"

    @property
    def loss(self) -> Literal["softmax", "sigmoid", "squares"]:
        """Return the loss of its outputs: cross-entropy over all classes, or of each label by itself, or the
        squared error."""
        return {"labels": "sigmoid", "values": "squares"}.get(self.kind, "softmax")  # type: ignore[return-value]

    @property
    def labels_are(self) -> Literal["tokens", "positions", "texts"]:
        """Return what its labels are of: one of each token, positions of tokens, or of a whole text."""
        return {"tags": "tokens", "span": "positions"}.get(self.kind, "texts")  # type: ignore[return-value]

    @property
    def num_outputs(self) -> int:
        """Return the number of outputs. Raise ValueError if it is not known yet."""
        if self.outputs is None:
            raise ValueError("the number of outputs is not resolved yet")
        return self.outputs

    @property
    def has_tokens(self) -> bool:
        """Return whether the model has the head of the language model besides."""
        return any(head.kind == "tokens" for head in self.heads)

    @property
    def is_of_whole_texts(self) -> bool:
        """Return whether each prediction is of a whole text."""
        if self.heads:
            return all(head.is_of_whole_texts for head in self.heads)
        return self.kind in ("classes", "labels", "values")

    @property
    def by_name(self) -> dict[str, TaskHeadConfig]:
        """Return the head of each of several tasks."""
        return dict(zip(self.names, self.heads, strict=True))

    def assuming(self, outputs: int) -> TaskHeadConfig:
        """Return the head with a number of outputs where it is not known yet."""
        if self.heads:
            return replace(self, heads=tuple(head.assuming(outputs) for head in self.heads))
        is_known = self.outputs is not None or self.kind == "tokens"
        return self if is_known else replace(self, outputs=outputs)

    def matrix_count(self, hidden_size: int) -> int:
        """Return the weights of the head's matrices, without those of the language model."""
        if self.heads:
            return sum(head.matrix_count(hidden_size) for head in self.heads)
        if self.kind == "tokens":
            return 0
        return hidden_size * (self.num_outputs + (hidden_size if self.dense else 0))

    def parameter_count(self, hidden_size: int) -> int:
        """Return the parameters of the head, without those of the language model."""
        if self.heads:
            variances = len(self.heads) if self.uncertain else 0
            return sum(head.parameter_count(hidden_size) for head in self.heads) + variances
        if self.kind == "tokens":
            return 0
        biases = (self.num_outputs if self.bias else 0) + (hidden_size if self.dense else 0)
        return self.matrix_count(hidden_size) + biases


def variance_share(head: TaskHeadConfig) -> float:
    """Return the factor of a loss over its variance: 1/2 of squared errors (Kendall et al., arXiv:1705.07115,
    equations 7 and 10)."""
    return 0.5 if head.loss == "squares" else 1.0
