"""What a batch means: samples → batch, (model, batch) → loss sum and target count.

Free of torch until a batch is made, so that a wrong configuration is refused at once.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, ClassVar, Literal, NamedTuple, Protocol, TypeAlias, runtime_checkable

import numpy as np

from llmtrain.config import Kinds
from llmtrain.corpus.config import TokenDataConfig
from llmtrain.errors import Problem
from llmtrain.files import at_home
from llmtrain.nn.labels import IGNORE_INDEX
from llmtrain.nn.model_config import Row

if TYPE_CHECKING:
    from torch import Tensor, nn

    from llmtrain.corpus.corpora import Corpora
    from llmtrain.data.datasets.base import Dataset
    from llmtrain.data.trace import Part
    from llmtrain.objectives.text import Spelling
    from llmtrain.tokenizers.base import Tokenizer

Batch: TypeAlias = "dict[str, Tensor]"

DROPOUT_KEYS = "dropout_keys"
"""In a batch: a key for each row, (B,) int64, from which dropout's masks are made; absent: torch's generator
makes them."""


@dataclass(frozen=True)
class Terms:
    """Sums over one batch; whoever divides, divides once, by the count over everything summed."""

    loss_sum: Tensor
    """Nats, 0-d fp32."""
    num_targets: Tensor
    """0-d int64, on the batch's device."""
    metrics: dict[str, Tensor] = field(default_factory=dict)
    """Name → a sum and the count that it is divided by, (2,)."""


class SpecialIds(NamedTuple):
    """The ids that an objective needs besides the corpus' own."""

    model: Any
    """The model's config with these ids in it."""
    vocab_size: int
    """Rows that its embedding needs."""
    marks: str = ""
    """The ids in words, for a refusal."""


class Shown(NamedTuple):
    """A sample as a person reads it."""

    facts: str
    """For its title: how many tokens bear a loss and the like."""
    lines: list[str]


class ObjectiveConfig(Kinds):
    """Base of all objectives' configs: frozen dataclasses with a `kind`, which need no torch."""

    kind: str
    teaches: ClassVar[tuple[str, ...]]
    """Kinds of model (models/family.py)."""
    data: ClassVar[Literal["tokens", "images"]] = "tokens"
    paired: ClassVar[Literal["needed", "refused", "taken"]] = "refused"
    """Whether the corpora hold paired texts; taken: a pair is two documents in a row."""

    fills_gaps: ClassVar[bool] = False
    """The model writes what stands in gaps, each behind a sentinel of its own."""

    def problems(self) -> Iterator[Problem]:
        """Yield what is wrong with the values."""
        yield from ()

    def row(self, sequence_length: int) -> Row:
        """Return what a row of `batch.sequence_length` tokens asks of the model."""
        return Row(sequence_length, predicted=sequence_length)

    def fitted(self, model: Any) -> Any:
        """Return the model's config with the heads that this objective lays over its trunk."""
        return model

    def length_problems(self, sequence_length: int, model: Any) -> Iterator[Problem]:
        """Yield what keeps rows of this length from being made."""
        yield from ()

    def data_problems(self, data: Any) -> Iterator[Problem]:
        """Yield what keeps it from reading data in the way that the section says."""
        yield from ()

    def special_ids(self, model: Any, corpora: Corpora) -> SpecialIds:
        """Return the ids that it needs."""
        return SpecialIds(model, corpora.vocab_size)

    def special_names(self, model: Any, tokenizer: Tokenizer) -> dict[int, str]:
        """Return id → name, as samples are shown."""
        return {}

    def open(
        self, model: Any, data: Any, corpora: Corpora | None, split: str, sequence_length: int
    ) -> dict[str, Dataset]:
        """Return corpus → the numbered samples of its split; "" where there is one alone. Corpora without
        held-out text are left out, and those without training text that none is drawn of.

        Raise DataError when they cannot be had."""
        from llmtrain.data.datasets.base import TokenSequences

        assert isinstance(data, TokenDataConfig)
        return {
            name: TokenSequences(
                tokens,
                sequence_length,
                packing=data.packing,
                overlap=data.overlap,
                cache=at_home(data.cache.dir),
            )
            for name, tokens in self.splits(data, corpora, split).items()
        }

    def splits(self, data: TokenDataConfig, corpora: Corpora | None, split: str) -> Mapping[str, Any]:
        """Return corpus → the tokens of its split."""
        assert corpora is not None
        return corpora.splits(split, data.undrawn if split == "train" else data.names)

    def build(self, model: Any, data: Any, corpora: Corpora | None = None) -> Objective:
        """Return the objective. model: with its special ids resolved."""
        raise NotImplementedError


class Objective(Protocol):
    """How a kind of model learns from a kind of sample."""

    def collate(self, raw: dict[str, np.ndarray]) -> Batch:
        """A dataset's samples, stacked, and "keys", a random number of each sample, int64 (B,) → the tensors
        that the model takes and their labels. A pure function."""

    def target_count(self, batch: Batch) -> int:
        """Return how many predictions the loss sums over; known before the forward pass."""

    def __call__(self, model: nn.Module, batch: Batch) -> Terms:
        """Return the loss to train on."""

    def evaluate(self, model: nn.Module, batch: Batch) -> Terms:
        """Return the loss and all metrics; the caller turns gradients and dropout off."""

    def figures(
        self, loss: float, num_targets: int, metrics: Mapping[str, float], num_bytes: int
    ) -> dict[str, float]:
        """Return further figures of an evaluation by name.

        loss: mean, nats; num_bytes: UTF-8 bytes of the text that the targets stand for."""

    def show(
        self,
        row: Mapping[str, np.ndarray],
        raw: Mapping[str, np.ndarray],
        text: Spelling,
        parts: Callable[[], Iterable[Part]],
    ) -> Shown:
        """Return one sample in words. row: its part of a batch; raw: as the dataset has it; parts: of which
        documents it is made."""


@runtime_checkable
class SharesSequences(Protocol):
    """An objective whose batches several processes can share token by token."""

    def part_of_sequences(self, batch: Batch, part: int, parts: int) -> Batch:
        """Return what process `part` of `parts` takes of each sequence."""


@runtime_checkable
class NamesArguments(Protocol):
    """An objective whose loss is what the model's forward gives: pipelines run that in stages."""

    def arguments(self, batch: Batch) -> dict[str, Tensor]:
        """Return what forward is given, by name."""


class LossOfModel:
    """Objectives whose loss is what the model's forward gives: the sum over the batch's "labels"."""

    names: ClassVar[Mapping[str, str]]
    """Key of a batch → forward's argument; those that a batch lacks are not given."""
    perplexity_of: ClassVar[str | None] = None
    """The metric, nats a token, whose exponential is the perplexity; None: the loss."""

    def target_count(self, batch: Batch) -> int:
        return int(count_targets(batch["labels"]))

    def arguments(self, batch: Batch) -> dict[str, Tensor]:
        """Return what the model's forward, or its `context` and stages, are given by name."""
        return {name: batch[key] for key, name in self.names.items() if key in batch}

    def __call__(self, model: nn.Module, batch: Batch) -> Terms:
        return Terms(model(**self.arguments(batch)), count_targets(batch["labels"]))

    def figures(
        self, loss: float, num_targets: int, metrics: Mapping[str, float], num_bytes: int
    ) -> dict[str, float]:
        """Add "perplexity", of tokens alone where the loss has more in it."""
        nats = loss if self.perplexity_of is None else metrics.get(self.perplexity_of, loss)
        return {"perplexity": float(np.exp(min(nats, 700.0)))}


def positions_in_documents(documents_BT: np.ndarray) -> np.ndarray:
    """Return each token's position in its document's part of the row, int64 (B, T)."""
    indices_T = np.arange(documents_BT.shape[1])
    starts_BT = np.zeros(documents_BT.shape, dtype=np.int64)
    changes_BT = documents_BT[:, 1:] != documents_BT[:, :-1]
    starts_BT[:, 1:] = np.where(changes_BT, indices_T[1:], 0)
    return indices_T - np.maximum.accumulate(starts_BT, axis=1)


def count_targets(labels: Tensor) -> Tensor:
    """Return the number of labels that bear a loss, 0-d int64."""
    return (labels != IGNORE_INDEX).sum()


def tensors(arrays: Mapping[str, np.ndarray]) -> Batch:
    """Return the arrays as tensors over the same memory."""
    import torch

    return {name: torch.from_numpy(np.ascontiguousarray(array)) for name, array in arrays.items()}


def ratio(total: Tensor, count: Tensor) -> Tensor:
    """Return a metric of Terms: a sum and what it is divided by, (2,)."""
    import torch

    return torch.stack([total, count])
