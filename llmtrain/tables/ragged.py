"""Columns of a table: an array, or pieces of different lengths one after another; stored as .npy files."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TypeAlias

import numpy as np


@dataclass(frozen=True)
class Ragged:
    """N pieces of different lengths."""

    values: np.ndarray
    """All pieces one after another."""
    ends: np.ndarray
    """End of each piece in `values`, int64 (N,)."""

    @classmethod
    def of(cls, pieces: Sequence[np.ndarray], dtype: np.typing.DTypeLike) -> Ragged:
        values = (
            np.concatenate([np.asarray(piece, dtype) for piece in pieces]) if pieces else np.zeros(0, dtype)
        )
        return cls(values, np.cumsum([len(piece) for piece in pieces], dtype=np.int64))

    @classmethod
    def of_texts(cls, texts: Sequence[str]) -> Ragged:
        """Return the texts as UTF-8."""
        return cls.of([np.frombuffer(text.encode(), np.uint8) for text in texts], np.uint8)

    def __len__(self) -> int:
        return len(self.ends)

    def __getitem__(self, index: int) -> np.ndarray:
        start = self.ends[index - 1] if index > 0 else 0
        return self.values[start : self.ends[index]]

    @property
    def starts(self) -> np.ndarray:
        """Return the begin of each piece, int64 (N,)."""
        return np.concatenate([np.zeros(1, np.int64), self.ends[:-1]]) if len(self.ends) else self.ends

    @property
    def lengths(self) -> np.ndarray:
        """Return the length of each piece, int64 (N,)."""
        return np.diff(self.ends, prepend=0)

    def text(self, index: int) -> str:
        """Return a piece of UTF-8 as text."""
        return self[index].tobytes().decode()


Column: TypeAlias = "np.ndarray | Ragged"


def join(parts: Sequence[Column]) -> Column:
    """Return the rows of all parts one after another."""
    arrays = [part for part in parts if isinstance(part, np.ndarray)]
    if len(arrays) == len(parts):
        return np.concatenate(arrays)
    ragged = [part for part in parts if isinstance(part, Ragged)]
    offsets = np.cumsum([0, *(len(part.values) for part in ragged[:-1])])
    ends = [part.ends + offset for part, offset in zip(ragged, offsets, strict=True)]
    return Ragged(np.concatenate([part.values for part in ragged]), np.concatenate(ends))


def take(column: Column, rows: np.ndarray) -> Column:
    """Return some rows of a column."""
    if isinstance(column, np.ndarray):
        return column[rows]
    pieces = [column[row] for row in rows.tolist()]
    return Ragged.of(pieces, column.values.dtype)


def save_columns(folder: Path, columns: Mapping[str, Column]) -> list[str]:
    """Write columns into a folder; return the names of the files."""
    written = []
    for name, column in columns.items():
        parts = (
            {name: column}
            if isinstance(column, np.ndarray)
            else {name: column.values, f"{name}.ends": column.ends}
        )
        for stem, array in parts.items():
            np.save(folder / f"{stem}.npy", array, allow_pickle=False)
            written.append(f"{stem}.npy")
    return written


def load_columns(folder: Path, files: Sequence[str]) -> dict[str, Column]:
    """Map the columns that `save_columns` wrote into memory."""
    arrays = {
        file.removesuffix(".npy"): np.load(folder / file, mmap_mode="r", allow_pickle=False) for file in files
    }
    return {
        name: Ragged(array, ends) if (ends := arrays.get(f"{name}.ends")) is not None else array
        for name, array in arrays.items()
        if not name.endswith(".ends")
    }
