"""Classification of texts and of pairs of texts: one label of several, or any number of labels."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any, ClassVar, Literal

import numpy as np

from llmtrain.config import require
from llmtrain.errors import Problem
from llmtrain.labels import IGNORE_INDEX
from llmtrain.nn.task_config import Pooling, TaskHeadConfig
from llmtrain.objectives.fields import examples_of, given_names, in_order, kind_of, label_of, texts_of
from llmtrain.objectives.task import Task, TaskConfig, Trunk
from llmtrain.tables.records import field_of

if TYPE_CHECKING:
    from torch import Tensor

    from llmtrain.data.datasets.examples import Examples
    from llmtrain.scoring.figure import Figure
    from llmtrain.scoring.report import Report
    from llmtrain.tables.build import Example
    from llmtrain.tables.config import TableDataConfig
    from llmtrain.tables.ragged import Column

MANY_LABELS = 8
"""Rows from which on labels that hardly any two rows share are taken for a mistake."""
MOST_LABELS = 0.9
"""Labels for a row up to which labels are taken for labels."""


@dataclass(frozen=True)
class ClassificationConfig(TaskConfig):
    """Predict the label of a text or of a pair of texts."""

    pools: ClassVar = True

    kind: Literal["classification"] = "classification"
    multi_label: bool = False
    """A text may have any number of labels; its field is a list, or text with commas between labels."""
    labels: tuple[str, ...] = ()
    """Labels in the order of the outputs; empty: those of the rows to train on, or of the model's head."""
    class_weights: Literal["none", "balanced"] = "none"
    """Weights of the classes in the training loss. balanced: as if all classes were equally frequent."""
    trunk: Trunk | None = None
    """What of an encoder-decoder the head reads. both: the decoder's states, which reads the text that the
    encoder reads; encoder: those of the encoder, without a decoder; null: both."""
    pooling: Pooling | None = None
    """Hidden state that stands for a text: first token, last token, or mean; null: what suits the family."""
    head_dropout: float = 0.1
    """Dropout probability before the outputs."""
    new_head: bool = False
    """Start with a new head where the model has one for this task already."""

    def problems(self) -> Iterator[Problem]:
        yield from super().problems()
        yield from require(
            not (self.multi_label and self.class_weights == "balanced"),
            "class_weights",
            self.class_weights,
            "none with multi_label=true",
        )

    def measures(self) -> tuple[str, ...]:
        from llmtrain.scoring.classification import CLASS_FIGURES, LABEL_FIGURES

        return LABEL_FIGURES if self.multi_label else CLASS_FIGURES

    def _head_kind(self) -> Literal["classes", "labels"]:
        return "labels" if self.multi_label else "classes"

    def head_of(self, head: TaskHeadConfig, table: Any) -> TaskHeadConfig:
        head = super().head_of(head, table)
        if self.class_weights == "none":
            return replace(head, class_weights=())
        counts = table.splits["train"]["labels"]
        rows, present = sum(counts.values()), sum(count > 0 for count in counts.values())
        weights = [rows / (present * counts[name]) if counts.get(name) else 0.0 for name in head.labels]
        return replace(head, class_weights=tuple(weights))

    def build(self, model: Any, data: Any, corpora: Any = None) -> Classification:
        return Classification(model)

    def identity(self) -> Mapping[str, Any]:
        return {**super().identity(), "multi_label": self.multi_label}

    def read(self, values: Mapping[str, Any], data: TableDataConfig) -> Example | None:
        value = field_of(values, data.label_field)
        if not self.multi_label:
            return examples_of(texts_of(values, data), label_of(value, data.label_field))
        items = value.split(",") if isinstance(value, str) else value
        if items is None:
            items = []
        if not isinstance(items, list):
            raise ValueError(f"{kind_of(value)} in the field {data.label_field}", "a list of labels, or text")
        found = tuple(label_of(item, data.label_field) for item in items if item not in (None, ""))
        return examples_of(texts_of(values, data), found)

    def blank_labels(self, contents: Sequence[Any]) -> dict[str, Column]:
        if not self.multi_label:
            return {"label": np.full(len(contents), IGNORE_INDEX, np.int64)}
        return {"label": np.full((len(contents), len(self.labels)), np.nan, np.float32)}

    def label_names(self, labels: Sequence[Any]) -> tuple[str, ...]:
        found = in_order(self._all(labels))
        count = len(labels)
        if self.labels or not count:
            return given_names(found, self.labels)
        if not found:
            raise ValueError(f"no label in any of {count:,} rows", "rows with labels")
        if len(found) == 1 and all(not self.multi_label or of_row for of_row in labels):
            raise ValueError(f"one label only, {found[0]}, in {count:,} rows", "two labels or more")
        if count >= MANY_LABELS and len(found) > MOST_LABELS * count:
            raise ValueError(
                f"{len(found):,} labels in {count:,} rows, such as {found[0][:40]!r}",
                "labels that several rows share; are data.text_field and data.label_field swapped?",
            )
        return given_names(found, self.labels)

    def encode_labels(self, labels: Sequence[Any], names: Sequence[str]) -> dict[str, Column]:
        numbers = {name: number for number, name in enumerate(names)}
        if not self.multi_label:
            return {"label": np.array([numbers[label] for label in labels], np.int64)}
        chosen = np.zeros((len(labels), len(names)), np.float32)
        for row, of_row in enumerate(labels):
            chosen[row, [numbers[label] for label in of_row]] = 1.0
        return {"label": chosen}

    def count_labels(self, labels: Sequence[Any]) -> Mapping[str, int]:
        counts = Counter(self._all(labels))
        return {name: counts[name] for name in in_order(counts)}

    def _all(self, labels: Sequence[Any]) -> list[str]:
        return [label for of_row in labels for label in of_row] if self.multi_label else list(labels)


class Classification(Task):
    """Cross-entropy of the label; with several labels, the mean of the binary cross-entropies of each."""

    def labels_of(self, raw: Mapping[str, np.ndarray], width: int) -> np.ndarray:
        return raw["label"]

    def count(self, labels: Tensor) -> Tensor:
        if self.head.kind == "classes":
            return super().count(labels)
        return (~labels[:, 0].isnan()).sum()

    def scores(
        self, dataset: Examples, rows: Mapping[int, np.ndarray], intervals: bool = True
    ) -> dict[str, Figure]:
        from llmtrain.scoring.classification import class_figures, label_figures

        probabilities, truth = self._judged(dataset, rows)
        of = class_figures if self.head.kind == "classes" else label_figures
        return of(probabilities, truth, intervals)

    def report(self, dataset: Examples, rows: Mapping[int, np.ndarray]) -> Report:
        from llmtrain.scoring.classification import class_report, label_report

        of = class_report if self.head.kind == "classes" else label_report
        return of(*self._judged(dataset, rows), self.head.labels)

    def _judged(self, dataset: Examples, rows: Mapping[int, np.ndarray]) -> tuple[np.ndarray, np.ndarray]:
        """Return the probabilities of each label, (rows, C), and the labels."""
        truth = dataset.split.array("label")[list(rows)]
        logits = np.stack(list(rows.values())).astype(np.float64)
        if self.head.kind == "classes":
            return softmax(logits), truth
        return 1.0 / (1.0 + np.exp(-logits)), truth

    def said(self, row: np.ndarray) -> dict[str, Any]:
        names = self.head.labels
        if self.head.kind == "classes":
            probabilities = softmax(row[None].astype(np.float64))[0]
            best = int(probabilities.argmax())
            return {"prediction": names[best], "probability": float(probabilities[best])}
        probabilities = 1.0 / (1.0 + np.exp(-row.astype(np.float64)))
        return {
            "prediction": [name for name, p in zip(names, probabilities, strict=True) if p >= 0.5],
            "probabilities": dict(zip(names, probabilities.tolist(), strict=True)),
        }

    def label_text(self, row: Mapping[str, np.ndarray]) -> str:
        label = row["labels"]
        if self.head.kind == "classes":
            return self.head.labels[int(label)] if int(label) != IGNORE_INDEX else "none"
        return ", ".join(self.head.labels[i] for i in np.flatnonzero(label > 0)) or "none"


def softmax(logits_NC: np.ndarray) -> np.ndarray:
    """Return the probabilities of each class."""
    exponents = np.exp(logits_NC - logits_NC.max(1, keepdims=True))
    return exponents / exponents.sum(1, keepdims=True)
