"""Base classes of objectives: build a batch from samples; compute loss sum and target count of a batch.

Imports torch only when a batch is made, so that a wrong configuration is refused at once.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, ClassVar, Literal, NamedTuple, Protocol, TypeAlias, runtime_checkable

import numpy as np

from llmtrain.config import Kinds, kinds_of, show
from llmtrain.corpus.config import TokenDataConfig
from llmtrain.corpus.corpora import Corpora
from llmtrain.errors import ConfigError, Problem, nearest
from llmtrain.files import expand_home
from llmtrain.labels import IGNORE_INDEX
from llmtrain.nn.model_config import Row

if TYPE_CHECKING:
    from torch import Tensor, nn

    from llmtrain.corpus.text_source import TextSource
    from llmtrain.data.datasets.base import Dataset
    from llmtrain.data.trace import Part
    from llmtrain.objectives.text import Spelling
    from llmtrain.scoring.figure import Figure
    from llmtrain.scoring.report import Report
    from llmtrain.tokenizers.base import Tokenizer

Batch: TypeAlias = "dict[str, Tensor]"

DROPOUT_KEYS = "dropout_keys"
"""Key of a batch: one dropout key per row, (B,) int64, from which dropout masks are generated. Without it
the masks come from torch's generator."""


@dataclass(frozen=True)
class Terms:
    """Sums over one batch. Divide only once, by the count over all batches that are summed."""

    loss_sum: Tensor
    """In nats, 0-d fp32."""
    num_targets: Tensor
    """0-d int64, on the batch's device."""
    metrics: dict[str, Tensor] = field(default_factory=dict)
    """Name → [sum, count that the sum is divided by], (2,)."""
    rows: list[np.ndarray] | None = None
    """What the model predicts of each row of the batch; figures over a whole split are computed from it."""


class SpecialIds(NamedTuple):
    """Model config and vocabulary size after an objective has resolved its special ids."""

    model: Any
    """The model's config with the special ids filled in."""
    vocab_size: int
    """Number of rows that the embedding needs."""
    marks: str = ""
    """The special ids in words, for error messages."""


class Shown(NamedTuple):
    """A sample in readable form."""

    facts: str
    """Summary for its title, such as the number of tokens that bear a loss."""
    lines: list[str]


class ObjectiveConfig(Kinds):
    """Base of all objective configs: frozen dataclasses with a `kind`, free of torch."""

    kind: str
    teaches: ClassVar[tuple[str, ...]]
    """Kinds of model that this objective can train (see models/family.py)."""
    data: ClassVar[Literal["tokens", "images", "columns", "table", "tasks"]] = "tokens"
    also_reads: ClassVar[tuple[str, ...]] = ()
    """Other kinds of data than `data` that it can read."""
    labels_rows: ClassVar[bool] = False
    """Whether the model says a label, or what stands for one, of each row of a table."""
    has_task_head: ClassVar[bool] = False
    """Whether the model has the head of a task in place of the language model's."""
    paired: ClassVar[Literal["needed", "refused", "taken"]] = "refused"
    """Whether the corpora must, must not or may hold paired texts; `taken`: they may, and a pair is read
    as two consecutive documents."""

    writes_answers: ClassVar[bool] = False
    """True if the model writes answers to the prompts of a table."""
    continues: ClassVar[bool] = False
    """True if the model continues a text; rows may then begin from its state after an earlier row."""
    pools: ClassVar[bool] = False
    """Whether one vector stands for a whole text."""
    divides_sequences: ClassVar[bool] = True
    """Whether ranks may hold different tokens of a row where the loss is computed."""
    takes_turns: ClassVar[bool] = False
    """Whether two parts of the model train against each other, in an engine of their own."""
    has_stages: ClassVar[bool] = True
    """Whether pipelines can run it: its loss is the output of the model's forward."""
    fills_gaps: ClassVar[bool] = False
    """Whether the model learns to write the contents of masked spans, each after its own sentinel."""

    packs_texts: ClassVar[bool] = False
    """Whether a row holds several texts."""
    new_tokens: tuple[str, ...] = ()
    """Special tokens that the tokenizer needs besides its own."""
    chat_template: str | None = None
    """The template that its conversations were rendered by."""
    end_ids: tuple[int, ...] = ()
    """Ids any of which ends an answer."""
    first_ids: tuple[int, ...] | None = None
    """Ids before each source; None: it does not say."""
    target_length: int | None = None
    """Most tokens of a target; None: as many as of a source."""

    @classmethod
    def form_of(cls, section: Mapping[str, Any]) -> type:
        """Return the config class of a section by its `kind`. Raise ConfigError if it is none below this."""
        kinds: dict[str, type] = {config.kind: config for config in kinds_of(cls)}  # type: ignore[attr-defined]
        kind = section.get("kind")
        if not isinstance(kind, str) or kind not in kinds:
            raise ConfigError(Problem("kind", show(kind), nearest(str(kind), list(kinds))))
        return kinds[kind]

    @classmethod
    def trains(cls, kind: str) -> bool:
        """Return whether the objective can train a model of this kind."""
        return kind in cls.teaches

    @classmethod
    def reads(cls, data: str) -> bool:
        """Return whether the objective can read this kind of data."""
        return data == cls.data or data in cls.also_reads

    def problems(self) -> Iterator[Problem]:
        """Yield a problem for each invalid value."""
        yield from ()

    def measures(self) -> tuple[str, ...]:
        """Return the names of what an evaluation during training gives besides the loss, the most telling
        first; of figures, all that the rows may define."""
        return ()

    def row(self, sequence_length: int) -> Row:
        """Return the shape of a row of `batch.sequence_length` tokens as the model sees it."""
        return Row(sequence_length, predicted=sequence_length)

    def following(self, model: Any) -> ObjectiveConfig:
        """Return the config with what follows from the model that training starts from."""
        return self

    def with_labels(self, texts: Any) -> ObjectiveConfig:
        """Return the config with the labels of the texts, as checkpoints store it."""
        return self

    def measured(self, model: Any, data: Any) -> tuple[ObjectiveConfig, Any]:
        """Return the config and the model's with what both take from the training split of data without text,
        as checkpoints store it. Raise DataError if it cannot be read."""
        return self, model

    def of_task(self, name: str) -> ObjectiveConfig:
        """Return the objective of one of several tasks."""
        raise KeyError(name)

    def fitted(self, model: Any) -> Any:
        """Return the model's config with the heads that this objective needs."""
        return model

    def keeps_head(self, model: Any) -> bool:
        """Return whether training goes on with the head of the model that it starts from."""
        return True

    def length_problems(self, sequence_length: int, model: Any) -> Iterator[Problem]:
        """Yield a problem if rows of this length cannot be made."""
        yield from ()

    def data_problems(self, data: Any) -> Iterator[Problem]:
        """Yield a problem if this objective cannot read data as the `data` section says."""
        yield from ()

    def special_ids(self, model: Any, corpora: TextSource) -> SpecialIds:
        """Return the model's config with the special ids of this objective resolved."""
        return SpecialIds(model, corpora.vocab_size)

    def special_names(self, model: Any, tokenizer: Tokenizer) -> dict[int, str]:
        """Return id → name of the special tokens, for showing samples."""
        return {}

    def open(
        self, model: Any, data: Any, corpora: TextSource | None, split: str, sequence_length: int
    ) -> dict[str, Dataset]:
        """Return corpus name → dataset of its split; the name is "" if there is only one.

        Leave out corpora without held-out text, and corpora of weight 0 without training text.
        Raise DataError if the data cannot be read.
        """
        from llmtrain.data.datasets.base import TokenSequences

        assert isinstance(data, TokenDataConfig)
        return {
            name: TokenSequences(
                tokens,
                sequence_length,
                packing=data.packing,
                overlap=data.overlap,
                cache=expand_home(data.cache.dir),
            )
            for name, tokens in self.splits(data, corpora, split).items()
        }

    def splits(self, data: TokenDataConfig, corpora: TextSource | None, split: str) -> Mapping[str, Any]:
        """Return corpus name → tokens of its split."""
        assert isinstance(corpora, Corpora)
        return corpora.splits(split, data.undrawn if split == "train" else data.names)

    def calibration_rows(self, model: Any, corpora: Any, sequence_length: int) -> Dataset | None:
        """Return rows to train on that an evaluation predicts first, for the objective's `calibrate`; None
        for none. Raise ConfigError if there are too few."""
        return None

    def build(self, model: Any, data: Any, corpora: TextSource | None = None) -> Objective:
        """Return the objective. The special ids of `model` must be resolved."""
        raise NotImplementedError


class SharesTrunk(ObjectiveConfig):
    """Base of the configs of objectives that can be one of several tasks over one trunk."""


class Objective(Protocol):
    """How a model learns from samples: batches, losses and metrics."""

    def collate(self, raw: dict[str, np.ndarray]) -> Batch:
        """Return the batch of stacked samples: the model's inputs and their labels. A pure function.
        Besides the dataset's arrays, `raw` holds "keys", one random number per sample, int64 (B,)."""

    def target_count(self, batch: Batch) -> int:
        """Return the number of predictions that the loss sums over; known before the forward pass."""

    def __call__(self, model: nn.Module, batch: Batch) -> Terms:
        """Return the training loss."""

    def evaluate(self, model: nn.Module, batch: Batch) -> Terms:
        """Return the loss and all metrics. The caller disables gradients and dropout."""

    def figures(
        self, loss: float, num_targets: int, metrics: Mapping[str, float], num_bytes: int
    ) -> dict[str, float]:
        """Return further results of an evaluation by name, such as the perplexity.

        loss: mean, in nats; num_bytes: UTF-8 bytes of the text of the targets.
        """

    def show(
        self,
        row: Mapping[str, np.ndarray],
        raw: Mapping[str, np.ndarray],
        text: Spelling,
        parts: Callable[[], Iterable[Part]],
    ) -> Shown:
        """Return one sample in readable form. row: the sample's row of a batch; raw: the sample as the
        dataset gives it; parts: the documents that the sample is made of."""


@runtime_checkable
class SharesSequences(Protocol):
    """An objective whose batches can be divided along the sequence (sequence parallelism)."""

    def part_of_sequences(self, batch: Batch, part: int, parts: int) -> Batch:
        """Return part `part` of `parts` of each sequence."""


@runtime_checkable
class NamesArguments(Protocol):
    """An objective whose loss is the output of the model's forward, which pipelines run in stages."""

    def arguments(self, batch: Batch) -> dict[str, Tensor]:
        """Return the arguments of the model's forward by name."""


@runtime_checkable
class PadsRows(Protocol):
    """An objective whose batches are as wide as their longest row."""

    def pad_fully(self) -> None:
        """From now on, make all batches as wide as the sequence length: pipelines need equal shapes."""


@runtime_checkable
class HasReference(Protocol):
    """An objective whose loss is measured against the model that training starts from. Without references its
    `evaluate` returns what they are made of as rows."""

    references: dict[bool, np.ndarray] | None
    """Whether rows are held out → predictions of them by that model, in the order of the dataset."""


@runtime_checkable
class Calibrates(Protocol):
    """An objective whose config may have calibration rows."""

    def calibrate(self, rows: Mapping[int, np.ndarray]) -> None:
        """Set later predictions by those of these rows. rows: number of a row → Terms.rows of it."""


@runtime_checkable
class WeighsTerms(Protocol):
    """An objective whose loss is a weighted sum of terms, each the mean over its own targets.

    The engine divides by the number N of all targets of the global batch, so a term of n targets is
    multiplied by N / n first.
    """

    def term_counts(self, batch: Batch) -> np.ndarray:
        """Return the number of targets of each term, int64 (K,); their sum is `target_count`."""

    def weighed(self, batch: Batch, counts: np.ndarray) -> Batch:
        """Return the batch with the factor of each term. counts: targets of each in the global batch."""

    def loss_of(self, metrics: Mapping[str, float]) -> float:
        """Return the loss that the metrics of a whole split come to."""


@runtime_checkable
class Scores(Protocol):
    """An objective with figures that take the predictions of all rows together."""

    def scores(
        self, dataset: Any, rows: Mapping[int, np.ndarray], intervals: bool = True
    ) -> dict[str, Figure]:
        """Return figures, the most telling first, with their intervals, which take the longest by far. rows:
        number of a row of the dataset → Terms.rows of it."""

    def report(self, dataset: Any, rows: Mapping[int, np.ndarray]) -> Report | None:
        """Return what single figures leave out, if the task has classes."""


class LossOfModel:
    """Base of objectives whose loss is the output of the model's forward: the sum over the batch's
    "labels"."""

    names: ClassVar[Mapping[str, str]]
    """Key of a batch → argument of forward. Keys that a batch lacks are not passed."""
    perplexity_of: ClassVar[str | None] = None
    """Metric, in nats per token, whose exponential is the perplexity; None: the loss."""

    def target_count(self, batch: Batch) -> int:
        return int(self.count(batch["labels"]))

    def count(self, labels: Tensor) -> Tensor:
        """Return the number of targets among the labels of a batch, 0-d int64."""
        return count_targets(labels)

    def arguments(self, batch: Batch) -> dict[str, Tensor]:
        """Return the arguments of the model's forward, or of its `context` and stages, by name."""
        return {name: batch[key] for key, name in self.names.items() if key in batch}

    def __call__(self, model: nn.Module, batch: Batch) -> Terms:
        return Terms(model(**self.arguments(batch)), count_targets(batch["labels"]))

    def figures(
        self, loss: float, num_targets: int, metrics: Mapping[str, float], num_bytes: int
    ) -> dict[str, float]:
        """Add "perplexity", of the tokens alone if the loss has other terms."""
        nats = loss if self.perplexity_of is None else metrics.get(self.perplexity_of, loss)
        return {"perplexity": float(np.exp(min(nats, 700.0)))}


def positions_in_documents(documents_BT: np.ndarray) -> np.ndarray:
    """Return each token's position in its document within the row, int64 (B, T)."""
    indices_T = np.arange(documents_BT.shape[1])
    starts_BT = np.zeros(documents_BT.shape, dtype=np.int64)
    changes_BT = documents_BT[:, 1:] != documents_BT[:, :-1]
    starts_BT[:, 1:] = np.where(changes_BT, indices_T[1:], 0)
    return indices_T - np.maximum.accumulate(starts_BT, axis=1)


def count_targets(labels: Tensor) -> Tensor:
    """Return the number of labels that bear a loss, 0-d int64."""
    return (labels != IGNORE_INDEX).sum()


def tensors(arrays: Mapping[str, np.ndarray]) -> Batch:
    """Return the arrays as tensors that share their memory."""
    import torch

    return {name: torch.from_numpy(np.ascontiguousarray(array)) for name, array in arrays.items()}


def ratio(total: Tensor, count: Tensor) -> Tensor:
    """Return a metric of Terms: [sum, count], (2,)."""
    import torch

    return torch.stack([total, count])
