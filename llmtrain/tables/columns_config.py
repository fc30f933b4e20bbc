"""The section `data` of tables of numbers and categories, and what a model knows of their columns. Free of
torch."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

from llmtrain.config import require
from llmtrain.corpus.config import CacheConfig, Locate
from llmtrain.errors import Problem
from llmtrain.prepare.config import SplitConfig
from llmtrain.tables.config import FilesOfSplits


@dataclass(frozen=True)
class ColumnDataConfig(FilesOfSplits):
    """Rows of numbers and categories, with a class each, from files: .csv, .tsv, .jsonl, .parquet."""

    has_text = False
    is_table = False

    path: str | None = None
    """A file, a folder, a glob pattern or `package:NAME/path`, whose rows are divided into splits by a hash
    of their values."""
    kind: Literal["columns"] = "columns"
    """Rows of numbers and categories."""
    format: Literal["auto", "csv", "tsv", "jsonl", "parquet", "json"] = "auto"
    """Form of the files; auto: by their extension."""
    header: bool = True
    """The first line of a csv or tsv names its columns; false: columns are named 0, 1, …"""
    quoting: Literal["auto", "double", "none"] = "auto"
    """Quotes in csv and tsv, as in `llmtrain prepare`."""
    label_field: str = "label"
    """Column of the class."""
    numeric: tuple[str, ...] = ()
    """Columns of numbers; []: those whose values in the training split are all numbers."""
    categorical: tuple[str, ...] = ()
    """Columns of categories; []: all others."""
    ignored: tuple[str, ...] = ()
    """Columns that are left out, such as the number of a row."""
    split: SplitConfig = field(default_factory=SplitConfig)
    """Shares of the rows of `path` that are held out."""
    workers: int = 0
    """Threads that read ahead on each rank; 0 reads in the training thread. Never changes the order."""

    def order_settings(self, sequence_length: int) -> dict[str, Any]:
        """Return no settings: rows have one order for each seed."""
        return {}

    @classmethod
    def reopened(
        cls, section: Mapping[str, Any], names: Sequence[str], order: Any, locate: Locate, cache: CacheConfig
    ) -> dict[str, Any]:
        """Return the section of a run with the present locations; see TokenDataConfig."""
        return {**section, **cls.relocated(section, locate)}

    def problems(self) -> Iterator[Problem]:
        yield from self.file_problems()
        for name in (*self.numeric, *self.categorical):
            yield from require(name != self.label_field, "label_field", name, "no column that is read too")
        yield from require(0 <= self.workers <= 256, "workers", self.workers, "0 to 256")


@dataclass(frozen=True)
class Column:
    """A column of the training split, as a model reads it."""

    name: str
    """Its name in the files."""
    mean: float = 0.0
    """Of a column of numbers: their mean, which is subtracted, and stands for a value that is not there."""
    std: float = 0.0
    """Their standard deviation, by which they are divided; 1 where all are alike; 0: categories."""
    categories: tuple[str, ...] = ()
    """Of a column of categories: its values, each a number that is 1 in the rows that have it."""

    def problems(self) -> Iterator[Problem]:
        yield from require((self.std > 0) != bool(self.categories), "std", self.std, "of numbers alone")

    @property
    def width(self) -> int:
        """Return how many numbers a model reads of it."""
        return len(self.categories) or 1
