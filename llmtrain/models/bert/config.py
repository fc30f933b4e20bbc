"""Config of BERT, with its parameter and FLOP counts. Free of torch.

Dim names: V vocabulary, D hidden_size, L num_layers, T sequence length.
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
class BertConfig(OfLayers):
    """A bidirectional encoder; covers BERT (arXiv:1810.04805) and RoBERTa (arXiv:1907.11692)."""

    family: Literal["bert"] = "bert"
    """Bidirectional encoder."""
    vocab_size: int | None = None
    """Rows of the embedding; null: the corpus' vocabulary and the three special tokens."""
    mask_id: int | None = None
    """Id of [MASK]; null: the tokenizer's if it has all three special tokens, else the first id after the
    corpus' vocabulary."""
    cls_id: int | None = None
    """Id of [CLS], which begins a pair of texts; null: the tokenizer's, or the second id after the
    vocabulary."""
    sep_id: int | None = None
    """Id of [SEP], which ends each text of a pair; null: the tokenizer's, or the third id after the
    vocabulary."""
    max_sequence_length: int = 512
    """Maximum sequence length, in tokens."""
    position_offset: int = 0
    """Row of the position embedding for the first position; RoBERTa's is 2."""
    num_segments: int = 2
    """Rows of the segment embedding; 0: none."""
    hidden_size: int = 768
    num_layers: int = 12
    num_heads: int = 12
    mlp_hidden_size: int | None = None
    """Width of the MLP; null: 4 · hidden_size."""
    activation: Literal["gelu", "gelu_tanh", "relu"] = "gelu"
    norm_eps: float = 1e-12
    tie_embeddings: bool = True
    """The head shares the token embedding's weight."""
    pair_head: bool | None = None
    """Pooler and classification head for a pair of texts; null: if the objective needs it."""
    dropout: float = 0.1
    init_std: float = 0.02
    task: TaskHeadConfig | None = field(default=None, metadata={INTERNAL: True})
    """Head of a fine-tuning task, in place of the language model's; set by the objective."""
    adaptation: Adaptation | None = field(default=None, metadata={INTERNAL: True})
    """What fine-tuning adds to the layers; set by the method."""

    @cached_property
    def blocks(self) -> LayerConfig:
        """Return the config of its layers."""
        return LayerConfig(
            hidden_size=self.hidden_size,
            num_layers=self.num_layers,
            num_heads=self.num_heads,
            mlp_hidden_size=self.mlp_hidden_size,
            activation=self.activation,
            norm_eps=self.norm_eps,
            dropout=self.dropout,
        )

    @property
    def special_ids(self) -> tuple[int, int, int]:
        """Return the ids of [MASK], [CLS] and [SEP]. Raise ValueError if they are not resolved."""
        if self.mask_id is None or self.cls_id is None or self.sep_id is None:
            raise ValueError("the special ids are not resolved yet")
        return self.mask_id, self.cls_id, self.sep_id

    @property
    def num_text_ids(self) -> int:
        """Return the upper bound of ids of text tokens: the special ids come after them unless they were
        set explicitly."""
        mask_id, cls_id, sep_id = self.special_ids
        return mask_id if (cls_id, sep_id) == (mask_id + 1, mask_id + 2) else self._vocab()

    @property
    def special_token_ids(self) -> dict[str, int]:
        named = {"mask": self.mask_id, "cls": self.cls_id, "sep": self.sep_id}
        return {role: number for role, number in named.items() if number is not None}

    def problems(self) -> Iterator[Problem]:
        length = self.max_sequence_length
        yield from require(length >= 1, "max_sequence_length", length, "1 or more")
        yield from self.vocabulary_problems()
        yield from self.blocks.problems()
        for name in ("mask_id", "cls_id", "sep_id", "position_offset", "num_segments"):
            value = getattr(self, name)
            allowed = "0 or more, or null" if name.endswith("_id") else "0 or more"
            yield from require(value is None or value >= 0, name, value, allowed)
            if self.vocab_size is not None and name.endswith("_id") and value is not None:
                allowed = f"less than vocab_size={self.vocab_size}, or null"
                yield from require(value < self.vocab_size, name, value, allowed)
        given = [i for i in (self.mask_id, self.cls_id, self.sep_id) if i is not None]
        yield from require(
            len(given) in (0, 3), "mask_id", self.mask_id, "all three special ids, or null for all"
        )
        yield from require(len(set(given)) == len(given), "mask_id", self.mask_id, "other ids for each")
        yield from require(
            not self.pair_head or self.num_segments >= 2,
            "num_segments",
            self.num_segments,
            "2 with model.pair_head=true, which objectives over pairs of texts need",
            "give objective=mlm, or model.num_segments=2",
        )

    def head_matrix_count(self, tensor: int = 1) -> int:
        """Return the weights of the heads' matrices on one of `tensor` ranks that divide the vocabulary."""
        D = self.hidden_size
        of_tasks = 0 if self.task is None else self.task.matrix_count(D)
        if not self.predicts_tokens:
            return of_tasks
        pairs = D * D + 2 * D if self.pair_head else 0
        return of_tasks + -(-self._vocab() // tensor) * D + D * D + pairs

    def layer_parameter_count(self, tensor: int = 1) -> int:
        """Return the parameters of one layer on one of `tensor` ranks that divide its matrices."""
        return self.blocks.layer_parameter_count(tensor)

    def step_parameter_counts(self, tensor: int = 1) -> list[int]:
        """Return the parameters of each step of a forward (embeddings, each layer, heads) on one of
        `tensor` ranks, with the vocabulary padded to a multiple of it. A tied head is counted in the first
        and the last."""
        D, V = self.hidden_size, -(-self._vocab() // tensor)
        positions = self.max_sequence_length + self.position_offset
        heads = 0 if self.task is None else self.task.parameter_count(D) - self.task.matrix_count(D)
        heads += self.head_matrix_count(tensor)
        if self.predicts_tokens:  # biases and a norm besides matrices
            heads += V + 3 * D + (D + 2 if self.pair_head else 0)
        return [
            (V + positions + self.num_segments + 2) * D,
            *[self.layer_parameter_count(tensor)] * self.num_layers,
            heads,
        ]

    def largest_parameter_count(self, tensor: int = 1) -> int:
        """Return the elements of the largest single parameter on one of `tensor` ranks."""
        D = self.hidden_size
        largest_of_layers = self.blocks.largest_layer_parameter_count(tensor)
        positions = self.max_sequence_length * D
        return max(largest_of_layers, -(-self._vocab() // tensor) * D, positions, D * D)

    def flops_per_token(self, row: Row) -> float:
        """Return forward and backward FLOPs per token: 6 per weight of a matrix, the head's for predicted
        tokens only, and attention's 12 · L · D · T."""
        D = self.hidden_size
        vocabulary_head = self._vocab() * D + D * D
        head = row.predicted / row.tokens * (self.head_matrix_count() if self.task else vocabulary_head)
        matrices = self.num_layers * self.layer_matrix_count() + head
        return 6.0 * matrices + 12.0 * self.num_layers * D * row.tokens
