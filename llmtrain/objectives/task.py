"""Fine-tuning tasks: what objectives over labelled texts have in common.

Dim names: B rows, T tokens of the longest row, C outputs of the head.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import replace
from typing import TYPE_CHECKING, Any, ClassVar, Literal

import numpy as np

from llmtrain.config import require
from llmtrain.errors import ConfigError, Problem
from llmtrain.models.registry import family_of
from llmtrain.nn.model_config import Row
from llmtrain.nn.task_config import Pooling, TaskHeadConfig
from llmtrain.objectives.base import (
    DROPOUT_KEYS,
    Batch,
    LossOfModel,
    ObjectiveConfig,
    SharesTrunk,
    Shown,
    SpecialIds,
    Terms,
    tensors,
)
from llmtrain.objectives.fields import texts_of
from llmtrain.objectives.masked_lm import encoder_ids, encoder_names
from llmtrain.objectives.seq2seq import start_and_end_ids

if TYPE_CHECKING:
    from torch import Tensor, nn

    from llmtrain.data.datasets.base import Dataset
    from llmtrain.data.datasets.examples import Examples
    from llmtrain.data.trace import Part
    from llmtrain.objectives.text import Spelling
    from llmtrain.scoring.figure import Figure
    from llmtrain.scoring.report import Report
    from llmtrain.tables.config import TableDataConfig
    from llmtrain.tables.ragged import Column
    from llmtrain.tables.table import Table, TableSplit
    from llmtrain.tokenizers.base import Frame, Tokenizer

Trunk = Literal["encoder", "both"]
"""What of an encoder-decoder carries a head: its encoder alone, or both sides, of which the decoder reads the
same text."""


class TaskConfig(SharesTrunk):
    """Base of the configs of fine-tuning tasks. A task also reads the rows of its table (TaskReader)."""

    teaches: ClassVar = ("decoder", "encoder", "permuted_encoder", "encoder_decoder")
    data: ClassVar = "table"
    has_task_head: ClassVar = True
    labels_rows: ClassVar = True
    head_kind: ClassVar[Literal["classes", "labels", "values", "tags", "span"]]
    divides_sequences: ClassVar = False

    labels: tuple[str, ...]
    trunk: Trunk | None
    pooling: Pooling | None
    head_dropout: float

    def problems(self) -> Iterator[Problem]:
        p = self.head_dropout
        yield from require(0.0 <= p < 1.0, "head_dropout", p, "0 up to, not including, 1")
        yield from require(
            len(set(self.labels)) == len(self.labels), "labels", self.labels, "each label once"
        )

    def length_problems(self, sequence_length: int, model: Any) -> Iterator[Problem]:
        """Yield a problem for a trunk that the model does not have."""
        if self.trunk is None:
            return
        if family_of(model).kind != "encoder_decoder":
            allowed = f"null with model.family={model.family}, which has one side"
            yield Problem("objective.trunk", self.trunk, allowed, "leave it out")
        elif model.task is not None and model.task.encoder_only != (self.trunk == "encoder"):
            own = "encoder" if model.task.encoder_only else "both"
            allowed = f"{own}, as the model's head has it"
            yield Problem("objective.trunk", self.trunk, allowed, "give objective.new_head=true")

    def row(self, sequence_length: int) -> Row:
        """Count a text as one prediction."""
        return Row(sequence_length, predicted=1)

    def fitted(self, model: Any) -> Any:
        """Return the model's config with a head for this task in place of its own."""
        if model.task is not None and self.keeps_head(model):
            return model
        usual = family_of(model).pooled
        head = TaskHeadConfig(
            self._head_kind(),
            pooling=self.pooling or usual.pooling,
            dense=self.pools and usual.dense,
            bias=usual.bias or not self.pools,
            dropout=self.head_dropout,
            encoder_only=self._encoder_only(model),
        )
        return replace(model, task=head)

    def keeps_head(self, model: Any) -> bool:
        before = model.task
        return before is None or (before.kind == self._head_kind() and not self.new_head)

    new_head: bool

    def _encoder_only(self, model: Any) -> bool:
        """Return whether the head reads an encoder without its decoder: for tags, which transformers has for
        T5, and where `trunk` says so."""
        if family_of(model).kind != "encoder_decoder":
            return False
        return self._head_kind() == "tags" if self.trunk is None else self.trunk == "encoder"

    def _head_kind(self) -> Literal["classes", "labels", "values", "tags", "span"]:
        return self.head_kind

    def following(self, model: Any) -> ObjectiveConfig:
        """Return the config with the labels of a head that the model has already."""
        if model.task is None or self.labels or not self.keeps_head(model):
            return self
        return replace(self, labels=model.task.labels)  # type: ignore[type-var]

    def with_labels(self, table: Table) -> ObjectiveConfig:
        """Return the config with the labels of the table, as checkpoints store it."""
        return self if self.labels else replace(self, labels=table.labels)  # type: ignore[type-var]

    def num_outputs(self, table: Any) -> int:
        """Return how many outputs the head needs."""
        return len(self.labels or table.labels)

    def head_of(self, head: TaskHeadConfig, table: Any) -> TaskHeadConfig:
        """Return the head with what the table says. Raise ConfigError for labels that a head of the model's
        own does not have in this order."""
        if head.outputs is not None:
            return self._head_with_labels(head)
        return replace(head, outputs=self.num_outputs(table), labels=self.labels or table.labels)

    def _head_with_labels(self, head: TaskHeadConfig) -> TaskHeadConfig:
        if not self.labels or self.labels == head.labels:
            return head
        # transformers' names of labels that nobody has named.
        are_unnamed = head.labels == tuple(f"LABEL_{number}" for number in range(len(self.labels)))
        if are_unnamed:
            return replace(head, labels=self.labels)
        allowed = f"{', '.join(head.labels[:12]) or 'none'}, as the model's head has them, in this order"
        remedy = "leave it out, or give objective.new_head=true"
        raise ConfigError(Problem("objective.labels", ", ".join(self.labels[:12]), allowed, remedy))

    def special_ids(self, model: Any, corpora: Any) -> SpecialIds:
        """Resolve the outputs of the head, and the special tokens of the model."""
        found = trunk_ids(model, corpora)
        return found._replace(model=replace(found.model, task=self.head_of(found.model.task, corpora)))

    def special_names(self, model: Any, tokenizer: Tokenizer) -> dict[int, str]:
        return trunk_names(model, tokenizer)

    def open(
        self, model: Any, data: Any, corpora: Any, split: str, sequence_length: int
    ) -> dict[str, Dataset]:
        return {"": self.examples(model, data, corpora, split, sequence_length)}

    def examples(self, model: Any, data: Any, table: Any, split: str, sequence_length: int) -> Examples:
        """Return the rows of a split as the model reads them."""
        tokenizer = table.load_tokenizer()
        return self.examples_of_split(model, table.split(split), tokenizer, sequence_length, data.group)

    def examples_of_split(
        self, model: Any, split: TableSplit, tokenizer: Tokenizer, sequence_length: int, group: int = 1
    ) -> Examples:
        """Return rows as the model reads them. group: see OrdersByLength."""
        from llmtrain.data.datasets.examples import Examples

        pad_id = tokenizer.special_ids.get("pad", tokenizer.eos_id)
        return Examples(split, sequence_length, frame_of(model, tokenizer), pad_id, group)

    # How rows of a table are read (see TaskReader); subclasses say the rest.

    def content(self, values: Mapping[str, Any], data: TableDataConfig) -> Any:
        """Return what of a row is tokenized, without its label. Raise ValueError as `read` does."""
        return texts_of(values, data)

    def blank_labels(self, contents: Sequence[Any]) -> dict[str, Column]:
        """Return the columns of labels of rows that have none."""
        raise NotImplementedError

    def identity(self) -> Mapping[str, Any]:
        return {"kind": self.kind}

    def encode_texts(self, contents: Sequence[Any], tokenizer: Tokenizer) -> dict[str, Column]:
        from llmtrain.tables.ragged import Ragged

        columns: dict[str, Column] = {}
        for name, texts in zip(("first", "second"), zip(*contents, strict=True), strict=False):
            columns[name] = Ragged.of(tokenizer.encode_arrays(list(texts)), np.int32)
        return columns


class Task(LossOfModel):
    """Base of fine-tuning objectives: the loss is that of the model's task head."""

    names: ClassVar = {
        "tokens": "tokens_BT",
        "documents": "documents_BT",
        "segments": "segments_BT",
        "lengths": "lengths_B",
        DROPOUT_KEYS: "dropout_keys_B",
    }

    def __init__(self, model: Any) -> None:
        family = family_of(model)
        self.head: TaskHeadConfig = model.task
        self.labels_argument = "labels_BM" if family.kind == "permuted_encoder" else "labels_BT"
        self._pads_fully = False
        # Later tokens see earlier ones alone in a decoder: padding at the end needs no mask.
        self._masks_padding = family.kind != "decoder"
        self._has_segments = bool(getattr(model, "num_segments", 0) or getattr(model, "has_segments", False))

    def collate(self, raw: dict[str, np.ndarray]) -> Batch:
        """Return "tokens" int64 (B, T), "lengths" int64 (B), "labels", and where the model has a use for them
        "documents" int32 (B, T), 1 at padding, and "segments" int64 (B, T)."""
        from llmtrain.data.datasets.examples import padded_width

        lengths, width = raw["lengths"], raw["tokens"].shape[1]
        if not self._pads_fully:
            width = min(width, padded_width(int(lengths.max())))
        segments = raw["segments"][:, :width]
        arrays = {
            "tokens": raw["tokens"][:, :width],
            "lengths": lengths,
            "labels": self.labels_of(raw, width),
        }
        if self._masks_padding:
            arrays["documents"] = (segments < 0).astype(np.int32)
        if self._has_segments:
            arrays["segments"] = np.maximum(segments, 0).astype(np.int64)
        return tensors(arrays)

    def pad_fully(self) -> None:
        self._pads_fully = True

    def labels_of(self, raw: Mapping[str, np.ndarray], width: int) -> np.ndarray:
        """Return the labels of a batch, as the head takes them."""
        raise NotImplementedError

    def inputs(self, batch: Batch) -> dict[str, Tensor]:
        """Return the arguments of the model's forward that give logits."""
        return super().arguments(batch)

    def arguments(self, batch: Batch) -> dict[str, Tensor]:
        return {**self.inputs(batch), self.labels_argument: batch["labels"]}

    def __call__(self, model: nn.Module, batch: Batch) -> Terms:
        return Terms(model(**self.arguments(batch)), self.count(batch["labels"]))

    def evaluate(self, model: nn.Module, batch: Batch) -> Terms:
        """Add the predictions of each row, from which figures are computed."""
        from llmtrain.nn.task_head import task_loss

        labels = batch["labels"]
        logits = model(**self.inputs(batch)).float()
        loss = task_loss(logits, labels, replace(self.head, class_weights=()))
        return Terms(loss, self.count(labels), rows=self.predictions(logits, batch))

    def predictions(self, logits: Tensor, batch: Batch) -> list[np.ndarray]:
        """Return what the head says of each row: for a text its logits, fp32 (C)."""
        return list(logits.cpu().numpy())

    def scores(
        self, dataset: Examples, rows: Mapping[int, np.ndarray], intervals: bool = True
    ) -> dict[str, Figure]:
        """Return the figures of the predictions of some rows of the dataset, with their intervals."""
        raise NotImplementedError

    def report(self, dataset: Examples, rows: Mapping[int, np.ndarray]) -> Report | None:
        """Return what single figures leave out; None: nothing."""
        return None

    def figures(
        self, loss: float, num_targets: int, metrics: Mapping[str, float], num_bytes: int
    ) -> dict[str, float]:
        return {}

    def show(
        self,
        row: Mapping[str, np.ndarray],
        raw: Mapping[str, np.ndarray],
        text: Spelling,
        parts: Callable[[], Iterable[Part]],
    ) -> Shown:
        """Return the row's text with its special tokens, and its label."""
        from llmtrain.objectives.text import indented

        tokens = row["tokens"][: int(row["lengths"])]
        return Shown(f"{len(tokens)} tokens, label {self.label_text(row)}", indented(text.spell(tokens, {})))

    def said(self, row: np.ndarray) -> dict[str, Any]:
        """Return what `predictions` holds of a row in words: "prediction", and "probability" or
        "probabilities"."""
        raise NotImplementedError

    def said_of(self, examples: Any, rows: Mapping[int, np.ndarray]) -> dict[int, dict[str, Any]]:
        """Return number of a row → `said` of it. rows: number of a sample of `examples` → what `predictions`
        has of it."""
        return {number: self.said(row) for number, row in rows.items()}

    def label_text(self, row: Mapping[str, np.ndarray]) -> str:
        """Return the label of a row of a batch in words."""
        raise NotImplementedError


def trunk_ids(model: Any, corpora: Any) -> SpecialIds:
    """Resolve the special tokens of the model, whatever its head."""
    kind = family_of(model).kind
    if kind == "encoder":
        return encoder_ids(model, corpora)
    return (
        start_and_end_ids(model, corpora)
        if kind == "encoder_decoder"
        else SpecialIds(model, corpora.vocab_size)
    )


def trunk_names(model: Any, tokenizer: Tokenizer) -> dict[int, str]:
    """Return id → name of the special tokens, for showing samples."""
    names = {i: f"[{role.upper()}]" for role, i in tokenizer.special_ids.items()}
    return names | (encoder_names(model) if family_of(model).kind == "encoder" else {})


def frame_of(model: Any, tokenizer: Tokenizer) -> Frame:
    """Return the special tokens around texts: the tokenizer's, else the family's, else eos between two."""
    from llmtrain.tokenizers.base import Frame, Template

    if tokenizer.frame is not None:
        return tokenizer.frame
    family = family_of(model)
    if family.frame is not None:
        return family.frame(model, tokenizer)
    return Frame(Template(), Template((), (tokenizer.eos_id,), (), (), (0,), ()))
