"""The list of row groups at the end of a parquet file (parquet.thrift, FileMetaData).

Arrow's own is not asked: where a number in it is wrong, Arrow's functions for Python end the process.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

_ROW_GROUPS = 4
_DEEPEST = 8
"""Structs and lists within each other; the format's own are six deep."""


@dataclass(frozen=True)
class Chunk:
    """The values of a column in a row group: [start, start + num_bytes) of the file."""

    column: str
    start: int
    num_bytes: int
    num_values: int


@dataclass(frozen=True)
class RowGroup:
    num_rows: int
    num_bytes: int
    """Of its unpacked pages, as the file says."""
    chunks: tuple[Chunk, ...]
    """Of the columns that are asked for."""


def row_groups(footer: bytes, columns: Sequence[str] = ()) -> Iterator[RowGroup]:
    """The row groups of a footer, one at a time, with their chunks of these columns.

    Raise ValueError for what is no footer.
    """
    struct = Struct(footer)
    try:
        for number, kind in struct.headers():
            if (number, kind) == (_ROW_GROUPS, 9):
                for group in struct.elements(0):
                    yield _row_group(group, columns)
            else:
                struct.value(kind, 0)
    except IndexError:
        raise ValueError("a list of row groups that is cut short") from None


def _row_group(group: Any, columns: Sequence[str]) -> RowGroup:
    found, names = [], [column.encode() for column in columns]
    for chunk in group.get(1, ()) if isinstance(group, dict) else ():
        described = chunk.get(3) if isinstance(chunk, dict) else None
        if not isinstance(described, dict):
            continue
        path = described.get(3)
        if not isinstance(path, list) or len(path) != 1 or path[0] not in names:
            continue
        start = number_of(described, 9)
        dictionary = described.get(11, 0)
        if isinstance(dictionary, int) and 0 < dictionary < start:
            start = dictionary
        if start < 0:
            raise ValueError(f"a column at byte {start:,}")
        found.append(Chunk(path[0].decode(), start, number_of(described, 7), number_of(described, 5)))
    return RowGroup(number_of(group, 3), number_of(group, 2), tuple(found))


def number_of(fields: Any, number: int) -> int:
    """A field of a struct. Raise ValueError if it is no number."""
    value = fields.get(number) if isinstance(fields, dict) else None
    if not isinstance(value, int):
        raise ValueError("a struct without its numbers")
    return value


class Struct:
    """Reads a struct of Thrift's compact protocol. Raise IndexError if the data end before it does, and
    ValueError for what is none."""

    def __init__(self, data: bytes) -> None:
        self._data = data
        self.place = 0

    def fields(self, depth: int = 0) -> dict[int, Any]:
        """Field by number: int, bytes, dict for a struct, list."""
        return {number: self.value(kind, depth) for number, kind in self.headers()}

    def headers(self) -> Iterator[tuple[int, int]]:
        """(number, kind) of each field, whose value is to be read before the next."""
        number = 0
        while byte := self._byte():
            number = number + (byte >> 4) if byte >> 4 else self._signed()
            yield number, byte & 15

    def value(self, kind: int, depth: int) -> Any:
        if kind in (1, 2):
            return kind == 1
        if kind == 3:
            return self._byte()
        if kind in (4, 5, 6):
            return self._signed()
        if kind == 7:
            return self._bytes(8)
        if kind == 8:
            return self._bytes(self._unsigned())
        if depth < _DEEPEST and kind in (9, 10):
            return list(self.elements(depth))
        if depth < _DEEPEST and kind == 12:
            return self.fields(depth + 1)
        raise ValueError("a struct that is none")

    def elements(self, depth: int) -> Iterator[Any]:
        """Of a list."""
        byte = self._byte()
        count, kind = byte >> 4 if byte >> 4 < 15 else self._unsigned(), byte & 15
        for _ in range(count):
            # A list's true or false takes a byte.
            yield self._byte() if kind in (1, 2) else self.value(kind, depth + 1)

    def _byte(self) -> int:
        byte = self._data[self.place]
        self.place += 1
        return byte

    def _bytes(self, count: int) -> bytes:
        if count > len(self._data) - self.place:
            raise IndexError(count)
        self.place += count
        return self._data[self.place - count : self.place]

    def _unsigned(self) -> int:
        value = shift = 0
        while True:
            byte = self._byte()
            value |= (byte & 127) << shift
            shift += 7
            if byte < 128:
                return value
            if shift > 63:
                raise ValueError("a number without end")

    def _signed(self) -> int:
        value = self._unsigned()
        return (value >> 1) ^ -(value & 1)
