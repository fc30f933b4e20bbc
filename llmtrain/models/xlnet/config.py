"""Config of an XLNet, with its parameter and FLOP counts. Free of torch.

Dim names: V vocabulary, D hidden_size, L num_layers, N num_heads, T sequence length.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field
from functools import cached_property
from typing import Literal

from llmtrain.adapt.config import Adaptation
from llmtrain.config import INTERNAL, require
from llmtrain.errors import Problem
from llmtrain.nn.layer_config import LayerConfig, OfLayers
from llmtrain.nn.model_config import Row
from llmtrain.nn.task_config import TaskHeadConfig


@dataclass(frozen=True)
class XLNetConfig(OfLayers):
    """A two-stream encoder with the relative positions of Transformer-XL (arXiv:1906.08237, 1901.02860),
    but without its recurrence over segments."""

    family: Literal["xlnet"] = "xlnet"
    """Two-stream encoder."""
    vocab_size: int | None = None
    """Rows of the embedding; null: the corpus' vocabulary."""
    hidden_size: int = 768
    num_layers: int = 12
    num_heads: int = 12
    mlp_hidden_size: int | None = None
    """Width of the MLP; null: 4 · hidden_size."""
    has_segments: bool = True
    """Learned scores that distinguish tokens of the same text of a row from those of others. Training here
    uses single texts and does not train them."""
    activation: Literal["gelu", "gelu_tanh", "relu"] = "gelu"
    norm_eps: float = 1e-12
    tie_embeddings: bool = True
    """The head shares the token embedding's weight."""
    dropout: float = 0.1
    init_std: float = 0.02
    task: TaskHeadConfig | None = field(default=None, metadata={INTERNAL: True})
    """Head of a fine-tuning task, in place of the language model's; set by the objective."""
    adaptation: Adaptation | None = field(default=None, metadata={INTERNAL: True})
    """What fine-tuning adds to the layers; set by the method."""

    @cached_property
    def blocks(self) -> LayerConfig:
        """Return the config of its MLPs."""
        return LayerConfig(
            hidden_size=self.hidden_size,
            num_layers=self.num_layers,
            num_heads=self.num_heads,
            mlp_hidden_size=self.mlp_hidden_size,
            activation=self.activation,
            norm_eps=self.norm_eps,
            dropout=self.dropout,
        )

    def problems(self) -> Iterator[Problem]:
        yield from self.vocabulary_problems()
        yield from self.blocks.problems()
        yield from require(
            self.hidden_size % 2 == 0, "hidden_size", self.hidden_size, "an even number: sines and cosines"
        )

    def layer_matrix_count(self, tensor: int = 1) -> int:
        """Return the weights of one layer's matrices (query, key, value, position, output, up, down) on
        one of `tensor` ranks that divide them."""
        D = self.hidden_size
        return (5 * D * D + 2 * D * self.mlp_width) // tensor

    def layer_parameter_count(self, tensor: int = 1) -> int:
        """Return the parameters of one layer on one of `tensor` ranks that divide its matrices. Parameters
        of each head, and biases of matrices divided by outputs, are divided too."""
        D = self.hidden_size
        of_heads = (5 if self.has_segments else 2) * D
        divided = self.layer_matrix_count() + of_heads + self.mlp_width
        return divided // tensor + D + 4 * D

    def step_parameter_counts(self, tensor: int = 1) -> list[int]:
        """Return the parameters of each step of a forward (embeddings, each layer, head) on one of
        `tensor` ranks, with the vocabulary padded to a multiple of it. A tied head is counted in the first
        and the last."""
        vocabulary = -(-self._vocab() // tensor)
        return [
            (vocabulary + (self.task is None)) * self.hidden_size,
            *[self.layer_parameter_count(tensor)] * self.num_layers,
            self.task.parameter_count(self.hidden_size) if self.task else vocabulary * (self.hidden_size + 1),
        ]

    def largest_parameter_count(self, tensor: int = 1) -> int:
        """Return the elements of the largest single parameter on one of `tensor` ranks."""
        D = self.hidden_size
        return max(2 * D * D // tensor, D * self.mlp_width // tensor, self.head_matrix_count(tensor))

    def flops_per_token(self, row: Row) -> float:
        """Return forward and backward FLOPs per token: 6 per weight of a matrix, and attention's 18 · L ·
        D · T for scores of contents and of positions. The query stream adds one position in predict_every,
        without keys and values; only these reach the head. The projection of distances, one for all rows
        of a batch, is not counted."""
        D, T = self.hidden_size, row.tokens
        share = row.predicted / T
        per_place = 2 * D * D + 2 * D * self.mlp_width  # query, output, up and down
        layer, head = 2 * D * D, self.head_matrix_count() * share
        if self.task is not None:
            share = 0.0  # no query stream
        matrices = self.num_layers * (per_place * (1 + share) + layer) + head
        return 6.0 * matrices + 18.0 * self.num_layers * D * T * (1 + share)
