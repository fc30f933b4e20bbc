"""Config of an encoder-decoder, with its parameter and FLOP counts. Free of torch.

Dim names: V vocabulary, D hidden_size, N num_heads, H head_dim, F mlp_hidden_size, R relative_buckets, L
num_layers, M num_decoder_layers, S source tokens, T target tokens.
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
class Seq2SeqConfig(OfLayers):
    """An encoder-decoder; covers the Transformer (arXiv:1706.03762), T5 (arXiv:1910.10683) and BART
    (arXiv:1910.13461)."""

    family: Literal["seq2seq"] = "seq2seq"
    """Encoder-decoder."""
    vocab_size: int | None = None
    """Rows of the embedding; null: the corpus' vocabulary and the missing special tokens."""
    start_id: int | None = None
    """Id that begins the decoder's input; null: the first id after the corpus' vocabulary."""
    mask_id: int | None = None
    """Id of [MASK] for denoising; null: the second id after the vocabulary."""
    sentinel_id: int | None = None
    """Id of the first span's sentinel for span corruption; further sentinels count DOWN from it (T5's
    order); null: the last row of the embedding."""
    num_sentinels: int | None = None
    """Number of sentinel ids, counted down from sentinel_id; null: that of the objective."""
    eos_id: int | None = None
    """Id that ends a source and a target; null: the tokenizer's."""
    max_sequence_length: int | None = None
    """Maximum tokens of a source, and of a target: the number of learned positions; null, for other kinds
    of positions: no limit."""
    hidden_size: int = 512
    num_layers: int = 6
    """Number of encoder layers."""
    num_decoder_layers: int | None = None
    """Number of decoder layers; null: num_layers."""
    num_heads: int = 8
    head_dim: int | None = None
    """Width of one head; null: hidden_size / num_heads."""
    mlp_hidden_size: int | None = None
    """Width of the MLP; null: 4 · hidden_size."""
    activation: Literal["gelu", "gelu_tanh", "silu", "relu"] = "relu"
    gated_mlp: bool = False
    """Gated MLP: down(act(gate(x)) · up(x)), three matrices (T5 1.1; arXiv:2002.05202)."""
    norm: Literal["layernorm", "rmsnorm"] = "layernorm"
    norm_eps: float = 1e-6
    norm_first: bool = False
    """Norms before attention and MLP and after the last layer of each side (pre-norm); else after each
    residual sum (post-norm)."""
    embedding_norm: bool = False
    """Norms after the embeddings."""
    positions: Literal["sinusoidal", "learned", "relative"] = "sinusoidal"
    """Kind of positions. sinusoidal: arXiv:1706.03762, section 3.5; learned: embeddings for sources and
    for targets; relative: self-attention biases by distance (arXiv:1910.10683, section 2.1), shared by all
    layers of a side."""
    position_offset: int = 0
    """Row of the position embedding for the first position; BART's is 2."""
    relative_buckets: int = 32
    """Number of buckets of relative distances, each with its own bias."""
    relative_max_distance: int = 128
    """Distance, in tokens, from which on all distances share a bucket."""
    scale_embedding: bool = True
    """Multiply embeddings by sqrt(D)."""
    scale_attention: bool = True
    """Divide attention scores by sqrt(H)."""
    scale_logits: bool = False
    """Divide the head's input by sqrt(D)."""
    bias: bool = True
    """Biases in all linear layers and LayerNorms."""
    head_bias: bool = False
    """Bias of each token's logit."""
    tie_embeddings: bool = True
    """The head shares the embedding's weight; sources and targets always share one embedding."""
    dropout: float = 0.1
    """Dropout probability of embeddings, of the outputs of attention and MLPs, and of attention weights."""
    label_smoothing: float = 0.0
    """Share of each target that is spread evenly over the vocabulary (label smoothing)."""
    init_std: float | None = None
    """Standard deviation of all initial weights; null: scaled by each matrix's input width."""
    task: TaskHeadConfig | None = field(default=None, metadata={INTERNAL: True})
    """Head of a fine-tuning task, in place of the language model's; set by the objective."""
    adaptation: Adaptation | None = field(default=None, metadata={INTERNAL: True})
    """What fine-tuning adds to the layers; set by the method."""

    @cached_property
    def blocks(self) -> LayerConfig:
        """Return the config of its layers."""
        return LayerConfig(
            hidden_size=self.hidden_size,
            num_layers=self.num_layers + self.decoder_layers,
            num_heads=self.num_heads,
            head_dim=self.head_dim,
            mlp_hidden_size=self.mlp_hidden_size,
            activation=self.activation,
            gated_mlp=self.gated_mlp,
            norm=self.norm,
            norm_eps=self.norm_eps,
            bias=self.bias,
            dropout=self.dropout,
        )

    @property
    def has_decoder(self) -> bool:
        """Return whether it has a decoder, which some heads of tasks do without."""
        return self.task is None or not self.task.encoder_only

    @property
    def decoder_layers(self) -> int:
        if not self.has_decoder:
            return 0
        return self.num_layers if self.num_decoder_layers is None else self.num_decoder_layers

    @property
    def special_token_ids(self) -> dict[str, int]:
        named = {"mask": self.mask_id}
        return {role: number for role, number in named.items() if number is not None}

    def problems(self) -> Iterator[Problem]:
        yield from self.vocabulary_problems()
        yield from self.blocks.problems()
        yield from require(self.num_layers >= 1, "num_layers", self.num_layers, "1 or more")
        got = self.num_decoder_layers
        yield from require(got is None or got >= 1, "num_decoder_layers", got, "1 or more, or null")
        for name in ("start_id", "mask_id", "sentinel_id", "eos_id", "position_offset"):
            value = getattr(self, name)
            allowed = "0 or more, or null" if name.endswith("_id") else "0 or more"
            yield from require(value is None or value >= 0, name, value, allowed)
            if self.vocab_size is not None and name.endswith("_id") and value is not None:
                allowed = f"less than vocab_size={self.vocab_size}, or null"
                yield from require(value < self.vocab_size, name, value, allowed)
        yield from require(
            (self.max_sequence_length or 0) >= 1 or self.positions != "learned",
            "max_sequence_length",
            self.max_sequence_length,
            "1 or more with positions=learned",
        )
        yield from require(
            self.relative_buckets >= 4 and self.relative_buckets % 4 == 0,
            "relative_buckets",
            self.relative_buckets,
            "a multiple of 4",
        )
        yield from require(
            self.relative_max_distance > self.relative_buckets // 2,
            "relative_max_distance",
            self.relative_max_distance,
            f"more than {self.relative_buckets // 2}, half of relative_buckets",
        )
        yield from require(
            0.0 <= self.label_smoothing < 1.0,
            "label_smoothing",
            self.label_smoothing,
            "0 up to, not including, 1",
        )

    def step_multiplications(self, tensor: int, sequence_length: int) -> list[int]:
        """Return the multiplications per token of each step (embeddings, each layer, head) on one of
        `tensor` ranks that divide its matrices."""
        encoder, decoder = (count // tensor for count in self._layer_matrices())
        attended = sequence_length * self.num_heads * self.head_width
        return [
            0,
            *[encoder + attended] * self.num_layers,
            *[decoder + 2 * attended] * self.decoder_layers,
            self.head_matrix_count(tensor),
        ]

    def step_parameter_counts(self, tensor: int = 1) -> list[int]:
        """Return the parameters of each step of a forward (embeddings, each layer, head) on one of
        `tensor` ranks, with the vocabulary padded to a multiple of it. A tied head is counted in the first
        and the last, and each side's biases of distances in each of its layers."""
        D = self.hidden_size
        norm = self.blocks.layer_norm_parameter_count() // 2
        vocabulary = -(-self._vocab() // tensor)
        encoder, decoder = self.layer_copies_count(tensor)
        encoder_layers = [encoder + 2 * norm] * self.num_layers
        decoder_layers = [decoder + 3 * norm] * self.decoder_layers
        embeddings, head = vocabulary * D, vocabulary * (D + (1 if self.head_bias else 0))
        if self.task is not None:
            head = self.task.parameter_count(D)
        sides = 2 if self.has_decoder else 1
        if self.positions == "learned":
            embeddings += sides * self._positions() * D
        if self.embedding_norm:
            embeddings += sides * norm
        if self.norm_first:
            encoder_layers[-1] += norm
            head += norm if self.has_decoder else 0
        if self.positions == "relative":
            relative = self._relative_count(tensor)
            encoder_layers = [count + relative for count in encoder_layers]
            decoder_layers = [count + relative for count in decoder_layers]
        return [embeddings, *encoder_layers, *decoder_layers, head]

    def repeated_count(self, steps: range, tensor: int = 1) -> int:
        """Return the parameters that several of `steps` share, counted once for each step but the first."""
        last = self.num_layers + self.decoder_layers + 1
        repeated = 0
        if self.tie_embeddings and self.task is None and 0 in steps and last in steps:
            repeated += self.head_matrix_count(tensor)
        if self.positions == "relative":
            for side in (range(1, self.num_layers + 1), range(self.num_layers + 1, last)):
                layers = sum(step in side for step in steps)
                repeated += max(0, layers - 1) * self._relative_count(tensor)
        return repeated

    def largest_parameter_count(self, tensor: int = 1) -> int:
        """Return the elements of the largest single parameter on one of `tensor` ranks."""
        D, inner = self.hidden_size, self.num_heads * self.head_width
        divided = max(3 * inner, self.mlp_width) * D // tensor
        positions = self._positions() * D if self.positions == "learned" else 0
        return max(divided, self.embedding_count(tensor), positions, D * D if self.task is not None else 0)

    def flops_per_token(self, row: Row) -> float:
        """Return forward and backward FLOPs of a row per source token, the tokens that are counted: 6 per
        weight of a matrix for each token that it reads, and attention's 12 · N · H for each pair of
        tokens, half of them in the decoder's causal triangle (PaLM, arXiv:2204.02311, appendix B)."""
        S, T = self.sides(row)
        L, M, inner = self.num_layers, self.decoder_layers, self.num_heads * self.head_width
        encoder, decoder = self._layer_matrices()
        keys_values = 2 * self.hidden_size * inner
        weights = L * encoder * S + M * ((decoder - keys_values) * T + keys_values * S)
        predicted = T if self.task is None else row.predicted
        attended = inner * (L * S * S + M * (T * T / 2 + T * S))
        weights_of_head = self.head_matrix_count() * predicted
        return (6.0 * (weights + weights_of_head) + 12.0 * attended) / S

    def sides(self, row: Row) -> tuple[int, int]:
        """Return the tokens that the encoder and the decoder read of a row; for a task, the decoder reads the
        same text."""
        if self.task is None:
            return row.tokens, row.target
        return row.tokens, row.tokens if self.has_decoder else 0

    def layer_copies_count(self, tensor: int = 1) -> tuple[int, int]:
        """Return the weights and biases of the linear layers of one encoder layer and of one decoder layer
        on one of `tensor` ranks."""
        D, inner = self.hidden_size, self.num_heads * self.head_width
        attention = 3 * inner // tensor + D if self.bias else 0
        mlp = self.mlp_width * (2 if self.gated_mlp else 1) // tensor + D if self.bias else 0
        encoder, decoder = (count // tensor for count in self._layer_matrices())
        return encoder + attention + mlp, decoder + 2 * attention + mlp

    def _relative_count(self, tensor: int) -> int:
        """Return the number of relative biases of one side."""
        return self.num_heads * self.relative_buckets // tensor

    def _layer_matrices(self) -> tuple[int, int]:
        """Return the weights of the matrices of one encoder layer and of one decoder layer."""
        D, inner = self.hidden_size, self.num_heads * self.head_width
        attention, mlp = 4 * D * inner, (3 if self.gated_mlp else 2) * D * self.mlp_width
        return attention + mlp, 2 * attention + mlp

    def _positions(self) -> int:
        """Return the rows of each side's position embedding."""
        return (self.max_sequence_length or 0) + self.position_offset
