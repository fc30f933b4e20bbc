"""Locate a rank's shard of a parameter in the whole parameter, by arithmetic on boxes. Does not import torch.

A parameter of any shape is treated as a matrix: (n,) as one row of n, (a, b, c) as a rows of b·c. Tensor
parallelism leaves a box of this matrix on a rank. ZeRO leaves a range of the flattened box, which consists of
at most three boxes: the end of a row, whole rows, the beginning of a row. Checkpoints and initialization use
boxes of the whole parameter, so that they do not depend on the layout.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from math import prod
from typing import NamedTuple


class Box(NamedTuple):
    """A submatrix of `rows` × `columns` elements of a parameter, starting at (`row`, `column`)."""

    row: int
    column: int
    rows: int
    columns: int

    @property
    def numel(self) -> int:
        return self.rows * self.columns

    def intersection(self, other: Box) -> Box | None:
        """Return the intersection of both boxes, None if it is empty."""
        row, column = max(self.row, other.row), max(self.column, other.column)
        rows = min(self.row + self.rows, other.row + other.rows) - row
        columns = min(self.column + self.columns, other.column + other.columns) - column
        return Box(row, column, rows, columns) if rows > 0 and columns > 0 else None


def matrix_shape(shape: tuple[int, ...]) -> tuple[int, int]:
    """Return (rows, columns) of the matrix as which a parameter of `shape` is treated."""
    if len(shape) <= 1:
        return 1, prod(shape)
    return shape[0], prod(shape[1:])


def whole(shape: tuple[int, ...]) -> Box:
    """Return the box of all elements."""
    return Box(0, 0, *matrix_shape(shape))


@dataclass(frozen=True)
class Shard:
    """Part `index` of `count` equal parts of a parameter along `dim`; the whole parameter by default.

    If `count` does not divide the dimension, the last parts extend beyond it with padding, which no box
    covers.
    """

    shape: tuple[int, ...]
    """Shape of the whole parameter."""
    dim: int = 0
    """0, or 1 for a matrix."""
    index: int = 0
    count: int = 1

    @property
    def local_shape(self) -> tuple[int, ...]:
        """Shape of this part, including padding."""
        part = -(-self.shape[self.dim] // self.count) if self.shape else 1
        return tuple(part if dim == self.dim else size for dim, size in enumerate(self.shape))

    @property
    def numel(self) -> int:
        return prod(self.local_shape)

    @property
    def is_padded(self) -> bool:
        """Whether the last parts contain padding."""
        return bool(self.shape) and self.shape[self.dim] % self.count != 0

    def pieces(self, start: int, stop: int) -> Iterator[tuple[Box, slice]]:
        """Yield the boxes of the whole parameter that elements [start, stop) of the flattened part cover,
        each with the slice of these stop − start elements that fills it row by row."""
        if not 0 <= start <= stop <= self.numel:
            raise ValueError(f"elements {start} to {stop} of {self.numel}")
        rows, columns = matrix_shape(self.local_shape)
        shift_row, shift_column = 0, 0
        if self.dim == 0 and len(self.shape) > 1:
            shift_row = self.index * rows
        else:
            shift_column = self.index * columns
        full = whole(self.shape)
        at = start
        while at < stop:
            row, column = divmod(at, columns)
            if column or stop - at < columns:
                box = Box(row, column, 1, min(columns - column, stop - at))
            else:
                box = Box(row, 0, (stop - at) // columns, columns)
            moved = Box(box.row + shift_row, box.column + shift_column, box.rows, box.columns)
            inside = moved.intersection(full)
            if inside is not None and (inside.columns == moved.columns or box.rows == 1):
                # Padding is at the end, after the elements of the box.
                yield inside, slice(at - start, at - start + inside.numel)
            elif inside is not None:  # several rows whose last columns are padding
                for i in range(box.rows):
                    begin = at - start + i * columns
                    yield (
                        Box(inside.row + i, inside.column, 1, inside.columns),
                        slice(begin, begin + inside.columns),
                    )
            at += box.numel
