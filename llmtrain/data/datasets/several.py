"""Rows of several tasks in one stream: each row has the arrays of all tasks, those of others empty."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence

import numpy as np

from llmtrain.data.datasets.base import EMPTY, Concatenation, Dataset, OrdersByLength, ReadsTars

TASK = "task"
"""Array of the number of each row's task."""


class RowsOfTask:
    """The samples of one task among those of others.

    An array `tokens` of the task `tags` is `tags/tokens`.
    """

    def __init__(self, name: str, dataset: Dataset, all_tasks: Mapping[str, Dataset]) -> None:
        """all_tasks: task → any dataset of it, which says what its arrays are."""
        self.name, self.dataset = name, dataset
        self._number = list(all_tasks).index(name)
        self._all = {**all_tasks, name: dataset}

    @property
    def fingerprint(self) -> str:
        return self.dataset.fingerprint

    @property
    def tar_sizes(self) -> np.ndarray:
        return self.dataset.tar_sizes

    def __len__(self) -> int:
        return len(self.dataset)

    def describe(self) -> str:
        return self.dataset.describe()

    def get(self, indices: np.ndarray) -> dict[str, np.ndarray]:
        """Return "task" int64 (M), and the arrays of all tasks."""
        empty = np.full_like(indices, EMPTY)
        raw = {TASK: np.full(len(indices), self._number, np.int64)}
        for name, dataset in self._all.items():
            own = dataset.get(indices if name == self.name else empty)
            raw |= {f"{name}/{key}": values for key, values in own.items()}
        return raw


class RowsByLength(RowsOfTask):
    """Samples of different lengths."""

    dataset: OrdersByLength  # type: ignore[assignment]

    @property
    def lengths(self) -> np.ndarray:
        return self.dataset.lengths

    @property
    def group(self) -> int:
        return self.dataset.group

    def batch_tokens(self, rows: np.ndarray) -> int:
        return self.dataset.batch_tokens(rows)


class RowsOfText(RowsOfTask):
    """Samples that are read from tar files on demand."""

    dataset: ReadsTars  # type: ignore[assignment]

    @property
    def tar_names(self) -> list[str]:
        return self.dataset.tar_names

    def want(self, tars: Sequence[int]) -> None:
        self.dataset.want(tars)

    def find_bad(self, tars: Sequence[int]) -> list[int]:
        return self.dataset.find_bad(tars)


def rows_of_tasks(datasets: Mapping[str, Dataset], all_tasks: Mapping[str, Dataset]) -> dict[str, Dataset]:
    """Return the datasets of some tasks as samples of one stream. all_tasks: see RowsOfTask."""

    def rows(name: str, dataset: Dataset) -> Dataset:
        if isinstance(dataset, OrdersByLength):
            return RowsByLength(name, dataset, all_tasks)  # type: ignore[arg-type]
        kind = RowsOfText if isinstance(dataset, ReadsTars) else RowsOfTask
        return kind(name, dataset, all_tasks)  # type: ignore[arg-type]

    return {name: rows(name, dataset) for name, dataset in datasets.items()}


def parts_of(dataset: Dataset) -> Iterator[tuple[str, int, Dataset]]:
    """Yield the name of each task, the number of its first sample among all, and its own dataset."""
    parts = dataset.parts() if isinstance(dataset, Concatenation) else [(0, dataset)]
    for first, part in parts:
        assert isinstance(part, RowsOfTask)
        yield part.name, first, part.dataset


def of_task(arrays: Mapping[str, np.ndarray], name: str) -> dict[str, np.ndarray]:
    """Return the arrays of one task under their own names."""
    prefix = f"{name}/"
    return {key.removeprefix(prefix): values for key, values in arrays.items() if key.startswith(prefix)}
