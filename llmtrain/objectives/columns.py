"""Classification of the rows of a table: numbers and categories in, one class out."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any, ClassVar, Literal

from llmtrain.config import require
from llmtrain.errors import ConfigError, Problem
from llmtrain.nn.model_config import Row
from llmtrain.objectives.base import ObjectiveConfig
from llmtrain.objectives.one_label import MEASURES, OneLabel
from llmtrain.tables.columns_config import Column

if TYPE_CHECKING:
    from llmtrain.corpus.text_source import TextSource
    from llmtrain.data.datasets.base import Dataset


@dataclass(frozen=True)
class ColumnsConfig(ObjectiveConfig):
    """Predict the class of a row of numbers and categories."""

    teaches: ClassVar = ("classifier",)
    data: ClassVar = "columns"

    kind: Literal["columns"] = "columns"
    columns: tuple[Column, ...] = ()
    """The columns as the training split has them, which checkpoints store; []: measured when training
    starts."""
    classes: tuple[str, ...] = ()
    """The classes in the order of their numbers; []: those of the training split."""

    def problems(self) -> Iterator[Problem]:
        same = bool(self.columns) == bool(self.classes)
        yield from require(same, "classes", list(self.classes), "given with columns, or left out with them")

    def measures(self) -> tuple[str, ...]:
        return MEASURES

    def row(self, sequence_length: int) -> Row:
        """Count a row as one token."""
        return Row(1, predicted=1)

    def measured(self, model: Any, data: Any) -> tuple[ObjectiveConfig, Any]:
        """Return the config with the columns of the training split, and the model with as many inputs and
        classes as they give."""
        if not hasattr(model, "inputs"):
            got = f"columns with model.family={model.family}, which reads images"
            raise ConfigError(Problem("objective", got, "a model with `inputs`", "give model=mlp"))
        config = self
        if not self.columns:
            from llmtrain.tables.columns import measure, read_columns

            columns, classes = measure(read_columns(data, "train"), data)
            config = replace(self, columns=columns, classes=classes)
        inputs = sum(column.width for column in config.columns)
        if model.inputs not in (None, inputs):
            got, allowed = str(model.inputs), f"{inputs}, which the columns give"
            raise ConfigError(Problem("model.inputs", got, allowed, "leave it out"))
        return config, replace(model, inputs=inputs, num_classes=len(config.classes))

    def open(
        self, model: Any, data: Any, corpora: TextSource | None, split: str, sequence_length: int
    ) -> dict[str, Dataset]:
        from llmtrain.data.datasets.columns import LabelledRows

        return {"": LabelledRows.open(data, split, self.columns, self.classes)}

    def build(self, model: Any, data: Any, corpora: TextSource | None = None) -> ColumnClassification:
        return ColumnClassification()


class ColumnClassification(OneLabel):
    """Cross-entropy of the class of a row."""

    key: ClassVar = "inputs"
