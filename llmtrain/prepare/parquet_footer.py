"""Parse the list of row groups in the footer of a parquet file (parquet.thrift, FileMetaData).

Arrow's Python functions are not used for this, because some wrong numbers in a footer make them end the
process.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

_ROW_GROUPS = 4
_DEEPEST = 8
"""Maximum nesting of structs and lists; that of the format is six."""


@dataclass(frozen=True)
class Chunk:
    """The column chunk of a row group: bytes [start, start + num_bytes) of the file."""

    column: str
    start: int
    num_bytes: int
    num_values: int


@dataclass(frozen=True)
class RowGroup:
    num_rows: int
    num_bytes: int
    """Uncompressed bytes of its pages, as stated in the footer."""
    chunks: tuple[Chunk, ...]
    """The column chunks of the requested columns."""


def row_groups(footer: bytes, columns: Sequence[str] = ()) -> Iterator[RowGroup]:
    """Yield the row groups of a footer, with the chunks of the given columns.

    Raise ValueError if the footer is damaged.
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
        raise ValueError("a truncated list of row groups") from None


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
    """Return a numeric field of a struct. Raise ValueError if it is missing or not a number."""
    value = fields.get(number) if isinstance(fields, dict) else None
    if not isinstance(value, int):
        raise ValueError("a struct with a missing number")
    return value


class Struct:
    """Reads a struct of Thrift's compact protocol. Methods raise IndexError if the data are truncated,
    ValueError if they are invalid."""

    def __init__(self, data: bytes) -> None:
        self._data = data
        self.offset = 0

    def fields(self, depth: int = 0) -> dict[int, Any]:
        """Return the fields by number; values are int, bytes, list, or dict for a struct."""
        return {number: self.value(kind, depth) for number, kind in self.headers()}

    def headers(self) -> Iterator[tuple[int, int]]:
        """Yield (number, kind) of each field; the caller reads its value before the next one."""
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
        raise ValueError("an invalid struct")

    def elements(self, depth: int) -> Iterator[Any]:
        """Yield the elements of a list."""
        byte = self._byte()
        count, kind = byte >> 4 if byte >> 4 < 15 else self._unsigned(), byte & 15
        for _ in range(count):
            # In a list, a boolean takes one byte.
            yield self._byte() if kind in (1, 2) else self.value(kind, depth + 1)

    def _byte(self) -> int:
        byte = self._data[self.offset]
        self.offset += 1
        return byte

    def _bytes(self, count: int) -> bytes:
        if count > len(self._data) - self.offset:
            raise IndexError(count)
        self.offset += count
        return self._data[self.offset - count : self.offset]

    def _unsigned(self) -> int:
        value = shift = 0
        while True:
            byte = self._byte()
            value |= (byte & 127) << shift
            shift += 7
            if byte < 128:
                return value
            if shift > 63:
                raise ValueError("a number of too many bytes")

    def _signed(self) -> int:
        value = self._unsigned()
        return (value >> 1) ^ -(value & 1)
