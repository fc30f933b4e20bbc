"""Regression: one number, or several, for a text or a pair of texts."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar, Literal

import numpy as np

from llmtrain.nn.task_config import Pooling
from llmtrain.objectives.fields import examples_of, kind_of, texts_of
from llmtrain.objectives.task import Task, TaskConfig, Trunk
from llmtrain.tables.records import field_of

if TYPE_CHECKING:
    from torch import Tensor

    from llmtrain.data.datasets.examples import Examples
    from llmtrain.objectives.base import ObjectiveConfig
    from llmtrain.scoring.figure import Figure
    from llmtrain.tables.build import Example
    from llmtrain.tables.config import TableDataConfig
    from llmtrain.tables.ragged import Column
    from llmtrain.tables.table import Table

LARGEST = 1e18
"""Largest number to predict: its square is a number in fp32."""


@dataclass(frozen=True)
class RegressionConfig(TaskConfig):
    """Predict a number for a text or a pair of texts."""

    head_kind: ClassVar = "values"
    pools: ClassVar = True

    kind: Literal["regression"] = "regression"
    labels: tuple[str, ...] = ()
    """Names of the numbers, if there are several; the field is then a list."""
    trunk: Trunk | None = None
    """What of an encoder-decoder the head reads. both: the decoder's states, which reads the text that the
    encoder reads; encoder: those of the encoder, without a decoder; null: both."""
    pooling: Pooling | None = None
    """Hidden state that stands for a text: first token, last token, or mean; null: what suits the family."""
    head_dropout: float = 0.0
    """Dropout probability before the outputs."""
    new_head: bool = False
    """Start with a new head where the model has one for this task already."""

    def measures(self) -> tuple[str, ...]:
        from llmtrain.scoring.regression import FIGURES

        if len(self.labels) < 2:
            return FIGURES
        return tuple(f"{name}_{figure}" for name in self.labels for figure in FIGURES)

    def num_outputs(self, table: Any) -> int:
        return max(1, len(self.labels))

    def with_labels(self, table: Table) -> ObjectiveConfig:
        return self

    def build(self, model: Any, data: Any, corpora: Any = None) -> Regression:
        return Regression(model)

    def read(self, values: Mapping[str, Any], data: TableDataConfig) -> Example | None:
        value = field_of(values, data.label_field)
        items = value if isinstance(value, list) else [value]
        wanted = max(1, len(self.labels))
        if len(items) != wanted:
            raise ValueError(f"{len(items)} numbers in the field {data.label_field}", f"{wanted}")
        return examples_of(texts_of(values, data), tuple(_number(item, data.label_field) for item in items))

    def blank_labels(self, contents: Sequence[Any]) -> dict[str, Column]:
        return {"label": np.full((len(contents), max(1, len(self.labels))), np.nan, np.float32)}

    def label_names(self, labels: Sequence[Any]) -> tuple[str, ...]:
        if labels and len(set(labels)) < 2:
            raise ValueError(
                f"the same number, {labels[0][0]:g}, in all {len(labels):,} rows", "other numbers"
            )
        return ()

    def encode_labels(self, labels: Sequence[Any], names: Sequence[str]) -> dict[str, Column]:
        return {"label": np.array(labels, np.float32).reshape(len(labels), -1)}

    def count_labels(self, labels: Sequence[Any]) -> Mapping[str, int]:
        return {}


def _number(value: Any, name: str) -> float:
    """Return a number. Raise ValueError for anything else."""
    try:
        if isinstance(value, bool):
            raise ValueError
        number = float(value)
    except OverflowError:  # an integer beyond the range of floats
        number = math.inf
    except (TypeError, ValueError):
        got = repr(value[:40]) if isinstance(value, str) else kind_of(value)
        raise ValueError(f"{got} in the field {name}", "a number") from None
    if not math.isfinite(number) or abs(number) > LARGEST:
        raise ValueError(f"{number} in the field {name}", f"a finite number, at most {LARGEST:g} in size")
    return number


class Regression(Task):
    """The squared error."""

    def labels_of(self, raw: Mapping[str, np.ndarray], width: int) -> np.ndarray:
        return raw["label"]

    def count(self, labels: Tensor) -> Tensor:
        return (~labels[:, 0].isnan()).sum()

    def scores(
        self, dataset: Examples, rows: Mapping[int, np.ndarray], intervals: bool = True
    ) -> dict[str, Figure]:
        from llmtrain.scoring.regression import value_figures

        predicted = np.stack(list(rows.values())).astype(np.float64)
        truth = np.asarray(dataset.split.array("label")[list(rows)], np.float64)
        if predicted.shape[1] == 1:
            return value_figures(predicted[:, 0], truth[:, 0], intervals)
        return {
            f"{name}_{figure}": value
            for column, name in enumerate(self.head.labels)
            for figure, value in value_figures(predicted[:, column], truth[:, column], intervals).items()
        }

    def said(self, row: np.ndarray) -> dict[str, Any]:
        values = [float(value) for value in row]
        return {"prediction": values if self.head.labels else values[0]}

    def label_text(self, row: Mapping[str, np.ndarray]) -> str:
        return ", ".join(f"{value:g}" for value in row["labels"].reshape(-1))
