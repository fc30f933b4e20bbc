"""Rows of numbers with a class each, held in memory.

Dim names: N rows; M rows of a micro-batch; I numbers of a row.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import xxhash

from llmtrain.data.datasets.base import EMPTY
from llmtrain.tables.columns import encode_rows, number_labels, read_columns
from llmtrain.tables.columns_config import Column, ColumnDataConfig


class LabelledRows:
    """The rows of one split."""

    def __init__(
        self, name: str, inputs_NI: np.ndarray, labels_N: np.ndarray, names: tuple[str, ...]
    ) -> None:
        """inputs: float32; labels: int64; names: of the classes."""
        self.name = name
        self._inputs_NI = inputs_NI
        self.labels = labels_N
        self.names = names

    @classmethod
    def open(
        cls, data: ColumnDataConfig, split: str, columns: Sequence[Column], classes: tuple[str, ...]
    ) -> LabelledRows:
        """Return the rows of a split as the columns of the training split say. Raise DataError if they cannot
        be read, or do not fit."""
        rows = read_columns(data, split)
        return cls(split, encode_rows(rows, columns), number_labels(rows, classes), classes)

    @property
    def fingerprint(self) -> str:
        digest = xxhash.xxh3_128(self._inputs_NI.tobytes())
        digest.update(self.labels.tobytes())
        return digest.hexdigest()

    @property
    def tar_sizes(self) -> np.ndarray:
        return np.array([len(self)])

    def __len__(self) -> int:
        return len(self.labels)

    def get(self, indices: np.ndarray) -> dict[str, np.ndarray]:
        """Return "inputs" float32 (M, I) and "labels" int64 (M), −1 for EMPTY samples."""
        # EMPTY is −1, which reads the last row; its label is overwritten.
        labels_M = np.where(indices == EMPTY, -1, self.labels[indices])
        return {"inputs": self._inputs_NI[indices], "labels": labels_M}

    def describe(self) -> str:
        return f"{self.name}: {len(self):,} rows of {self._inputs_NI.shape[1]} numbers"
