"""Config of the recurrent encoder-decoder, with its parameter and FLOP counts. Free of torch.

Dim names: V vocabulary, E embedding_width, D hidden_size, L num_layers, M decoder layers, G gates of a cell.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Literal

from llmtrain.adapt.config import Adaptation
from llmtrain.config import INTERNAL, require
from llmtrain.errors import Problem
from llmtrain.nn.model_config import OfVocabulary, Row
from llmtrain.nn.task_config import TaskHeadConfig

Cell = Literal["rnn", "gru", "lstm"]
GATES: dict[str, int] = {"rnn": 1, "gru": 3, "lstm": 4}


@dataclass(frozen=True)
class RecurrentSeq2SeqConfig(OfVocabulary):
    """A recurrent encoder that reads from both sides, and a recurrent decoder that attends to its states
    (Bahdanau et al., arXiv:1409.0473)."""

    family: Literal["recurrent_seq2seq"] = "recurrent_seq2seq"
    """Recurrent encoder-decoder with attention."""
    cell: Cell = "gru"
    """Kind of the cells: plain with tanh, gated recurrent units (arXiv:1406.1078), or long short-term
    memory."""
    vocab_size: int | None = None
    """Rows of the embedding; null: the corpus' vocabulary and the missing special tokens."""
    start_id: int | None = None
    """Id that begins the decoder's input; null: the first id after the corpus' vocabulary."""
    mask_id: int | None = None
    """Id of [MASK] for denoising; null: the second id after the vocabulary."""
    sentinel_id: int | None = None
    """Id of the first span's sentinel for span corruption; further sentinels count DOWN from it; null: the
    last row of the embedding."""
    num_sentinels: int | None = None
    """Number of sentinel ids, counted down from sentinel_id; null: that of the objective."""
    eos_id: int | None = None
    """Id that ends a source and a target; null: the tokenizer's."""
    hidden_size: int = 256
    """Width of a state, in the encoder for each direction."""
    embedding_size: int | None = None
    """Width of the embedding; null: hidden_size."""
    num_layers: int = 1
    """Number of encoder layers."""
    num_decoder_layers: int | None = None
    """Number of decoder layers, the first of which attends to the source; null: num_layers."""
    tie_embeddings: bool = True
    """The head shares the embedding's weight; sources and targets always share one embedding."""
    dropout: float = 0.1
    """Dropout probability of embeddings, between layers, and of what the head reads."""
    label_smoothing: float = 0.0
    """Share of each target that is spread evenly over the vocabulary (label smoothing)."""
    task: TaskHeadConfig | None = field(default=None, metadata={INTERNAL: True})
    """Head of a fine-tuning task, which this model refuses; set by the objective."""
    adaptation: Adaptation | None = field(default=None, metadata={INTERNAL: True})
    """What fine-tuning adds to the layers; set by the method."""

    @property
    def steps_by_token(self) -> bool:
        return True

    @property
    def special_token_ids(self) -> dict[str, int]:
        named = {"mask": self.mask_id}
        return {role: number for role, number in named.items() if number is not None}

    def problems(self) -> Iterator[Problem]:
        yield from self.vocabulary_problems()
        for name in ("hidden_size", "num_layers"):
            yield from require(getattr(self, name) >= 1, name, getattr(self, name), "1 or more")
        for name in ("embedding_size", "num_decoder_layers"):
            value = getattr(self, name)
            yield from require(value is None or value >= 1, name, value, "1 or more, or null")
        for name in ("start_id", "mask_id", "sentinel_id", "eos_id"):
            value = getattr(self, name)
            yield from require(value is None or value >= 0, name, value, "0 or more, or null")
            if self.vocab_size is not None and value is not None:
                allowed = f"less than vocab_size={self.vocab_size}, or null"
                yield from require(value < self.vocab_size, name, value, allowed)
        for name in ("dropout", "label_smoothing"):
            share = getattr(self, name)
            yield from require(0.0 <= share < 1.0, name, share, "0 up to, not including, 1")
        if self.task is not None:
            got, allowed = f"{self.family} with the head of a task", "a family with such heads, such as gru"
            yield Problem("family", got, allowed, "give model=bilstm or model=attention_lstm")

    @property
    def gates(self) -> int:
        return GATES[self.cell]

    @property
    def embedding_key(self) -> str:
        return "embedding_size"

    @property
    def embedding_width(self) -> int:
        return self.hidden_size if self.embedding_size is None else self.embedding_size

    @property
    def output_width(self) -> int:
        return self.embedding_width

    @property
    def decoder_layers(self) -> int:
        return self.num_layers if self.num_decoder_layers is None else self.num_decoder_layers

    def embedding_count(self, tensor: int = 1) -> int:
        return self._vocab() * self.embedding_width

    @property
    def encoder_widths(self) -> list[int]:
        """Return the width of what each encoder layer reads."""
        return [self.embedding_width, *[2 * self.hidden_size] * (self.num_layers - 1)]

    @property
    def decoder_widths(self) -> list[int]:
        """Return the width of what each decoder layer reads; of the first, an embedding and a context."""
        upper = [self.hidden_size] * (self.decoder_layers - 1)
        return [self.embedding_width + 2 * self.hidden_size, *upper]

    @property
    def readout_width(self) -> int:
        """Return the width of what the head is computed from: state, embedding, context."""
        return 3 * self.hidden_size + self.embedding_width

    def _matrices(self) -> tuple[int, int]:
        """Return the weights without biases that each source token, and each target token, meets."""
        G, D, E = self.gates, self.hidden_size, self.embedding_width
        of_source = sum(2 * G * D * (width + D) for width in self.encoder_widths) + 2 * D * D
        of_target = sum(G * D * (width + D) for width in self.decoder_widths) + D * D
        return of_source, of_target + 2 * E * self.readout_width

    def step_parameter_counts(self, tensor: int = 1) -> list[int]:
        """Return all parameters as one step, with a tied head counted once. Needs vocab_size."""
        G, D, L, M = self.gates, self.hidden_size, self.num_layers, self.decoder_layers
        cells = 2 * G * D * (2 * L + M)
        attention = D + D  # bias of the keys, and the vector of scores
        bridge = M * (D * D + D)
        readout = 2 * self.embedding_width
        head = 0 if self.tie_embeddings else self.embedding_count()
        total = sum(self._matrices()) + cells + attention + bridge + readout
        return [self.embedding_count() + total + head]

    def largest_parameter_count(self, tensor: int = 1) -> int:
        G, D = self.gates, self.hidden_size
        widest = max(*self.encoder_widths, *self.decoder_widths)
        readout = 2 * self.embedding_width * self.readout_width
        return max(self.embedding_count(), G * D * widest, readout, D * D * self.decoder_layers)

    def flops_per_token(self, row: Row) -> float:
        """Return forward and backward FLOPs per source token."""
        of_source, of_target = self._matrices()
        scores = 3 * self.hidden_size * row.tokens  # of each target token, over the whole source
        targets = row.target * (of_target + scores) + row.predicted * self.embedding_count()
        return 6.0 * (of_source + targets / row.tokens)
