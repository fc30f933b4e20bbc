"""Where a rank's part of a parameter lies in the whole: arithmetic on boxes, free of torch.

A parameter of any shape is looked at as a matrix: (n,) as one row of n, (a, b, c) as a rows of b·c.
What tensor parallelism leaves on a rank is a box of that matrix, and what ZeRO leaves of it, a range
of the flattened box, is three boxes at most: the end of a row, whole rows, the beginning of a row.
Checkpoints and initialization speak in boxes of the whole parameter, so that they know no layout.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from math import prod
from typing import NamedTuple


class Box(NamedTuple):
    """`rows` × `columns` elements of a parameter's matrix from (`row`, `column`) on."""

    row: int
    column: int
    rows: int
    columns: int

    @property
    def numel(self) -> int:
        return self.rows * self.columns

    def intersection(self, other: Box) -> Box | None:
        """What both cover, or None."""
        row, column = max(self.row, other.row), max(self.column, other.column)
        rows = min(self.row + self.rows, other.row + other.rows) - row
        columns = min(self.column + self.columns, other.column + other.columns) - column
        return Box(row, column, rows, columns) if rows > 0 and columns > 0 else None


def matrix_shape(shape: tuple[int, ...]) -> tuple[int, int]:
    """(rows, columns) of the matrix that a parameter of `shape` is looked at as."""
    if len(shape) <= 1:
        return 1, prod(shape)
    return shape[0], prod(shape[1:])


def whole(shape: tuple[int, ...]) -> Box:
    """The box of all elements."""
    return Box(0, 0, *matrix_shape(shape))


@dataclass(frozen=True)
class Shard:
    """Part `index` of `count` equal parts of a parameter along `dim`; the whole of it by default.

    Where `count` does not divide the dim, the last parts reach beyond it: those elements are padding,
    which no box covers.
    """

    shape: tuple[int, ...]
    """Of the whole parameter."""
    dim: int = 0
    """0, or 1 of a matrix."""
    index: int = 0
    count: int = 1

    @property
    def local_shape(self) -> tuple[int, ...]:
        """Of this part, padding included."""
        part = -(-self.shape[self.dim] // self.count) if self.shape else 1
        return tuple(part if dim == self.dim else size for dim, size in enumerate(self.shape))

    @property
    def numel(self) -> int:
        return prod(self.local_shape)

    @property
    def is_padded(self) -> bool:
        """Whether the last parts hold elements that the whole lacks."""
        return bool(self.shape) and self.shape[self.dim] % self.count != 0

    def pieces(self, start: int, stop: int) -> Iterator[tuple[Box, slice]]:
        """What elements [start, stop) of the flattened part are in the whole: each box, and its place
        among the stop − start elements, which fill it row by row."""
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
                # Padding is at the end: what is inside comes first.
                yield inside, slice(at - start, at - start + inside.numel)
            elif inside is not None:  # columns cut off in many rows
                for i in range(box.rows):
                    begin = at - start + i * columns
                    yield (
                        Box(inside.row + i, inside.column, 1, inside.columns),
                        slice(begin, begin + inside.columns),
                    )
            at += box.numel
