"""What the pages of a parquet file may become in memory, told before any of them is unpacked.

A page is packed, and its values may be places in a dictionary or continue the value before: of a page of a
few bytes, a reader may make billions. Headers of pages say how large they are (parquet.thrift, PageHeader);
a reader that unpacks a page compares.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np

PAGE_BYTES = 128 << 20
"""Most bytes of an unpacked page; writers cut pages at 1 MB most often, at 100 MB at the latest."""
BATCH_BYTES = 128 << 20
"""Most bytes of the rows that are read at a time, where one row alone does not take more."""
MOST_ROWS = 512
"""Read at a time."""
_HEADER_BYTES = (256, 1 << 16, 16 << 20)
"""So much is read in turn for a page's header; the last is Arrow's own bound."""
_DATA_PAGE, _DICTIONARY_PAGE, _DATA_PAGE_V2 = 0, 2, 3
_PLAIN, _DELTA_LENGTHS = 0, 6
_DICTIONARY_CODED = (2, 8)


@dataclass(frozen=True)
class Page:
    num_rows: int
    num_bytes: int
    """Of all its values, where each stands in the page itself."""
    bytes_each: int
    """Most bytes of a value, where values are made from others; or 0."""


def rows_at_a_time(pages: list[Page]) -> int:
    """Return how many rows of consecutive pages fit in BATCH_BYTES together, wherever they stand."""
    stops = np.cumsum([page.num_rows for page in pages], dtype=np.float64)
    rows = MOST_ROWS
    while rows > 1:
        # The first row of the heaviest batch is the last of some page.
        last = np.searchsorted(stops, stops - 1 + rows)
        weights = [min(page.num_rows, rows) * page.bytes_each or page.num_bytes for page in pages]
        sums = np.append(np.cumsum(weights, dtype=np.float64), np.sum(weights, dtype=np.float64))
        if (sums[last] - sums[: len(pages)] + np.array(weights) <= BATCH_BYTES).all():
            break
        rows //= 2
    return rows


def pages_of(descriptor: int, start: int, stop: int, num_values: int) -> Iterator[Page]:
    """The data pages of a column's chunk, which lies at [start, stop) of the file and has so many values.

    Raises ValueError, with a short reason, for a page that is none or larger than PAGE_BYTES.
    """
    dictionary_bytes = seen = 0
    while seen < num_values and start < stop:
        header, length = _header(descriptor, start, stop)
        kind, unpacked, packed = (_number(header, field) for field in (1, 2, 3))
        if min(unpacked, packed) < 0:
            raise ValueError(f"a page of {min(unpacked, packed):,} bytes")
        if unpacked > PAGE_BYTES:
            raise ValueError(f"a page of {unpacked:,} bytes, more than {PAGE_BYTES:,}")
        start += length + packed
        if kind == _DICTIONARY_PAGE:
            dictionary_bytes = unpacked
            count = _number(header.get(7), 1)
            if count * 4 > unpacked:
                raise ValueError(f"{unpacked:,} bytes of a dictionary of {count:,} values")
        elif kind in (_DATA_PAGE, _DATA_PAGE_V2):
            described = header.get(5 if kind == _DATA_PAGE else 8)
            count, encoding = _number(described, 1), _number(described, 2 if kind == _DATA_PAGE else 4)
            if count < 0:
                raise ValueError(f"a page of {count:,} values")
            seen += count
            each = dictionary_bytes if encoding in _DICTIONARY_CODED else unpacked
            yield Page(count, unpacked, 0 if encoding in (_PLAIN, _DELTA_LENGTHS) else each)


def _header(descriptor: int, start: int, stop: int) -> tuple[dict[int, Any], int]:
    """(fields by number, bytes) of the page's header at `start`."""
    for size in _HEADER_BYTES:
        data = os.pread(descriptor, min(size, stop - start), start)
        struct = _Struct(data)
        try:
            return struct.fields(), struct.place
        except IndexError:
            if len(data) < size:
                break
    raise ValueError(f"no page at byte {start:,}")


def _number(fields: Any, number: int) -> int:
    value = fields.get(number) if isinstance(fields, dict) else None
    if not isinstance(value, int):
        raise ValueError("a page's header without its numbers")
    return value


class _Struct:
    """Reads a struct of Thrift's compact protocol: its numbers, and the structs in it. Raises IndexError
    where the data end before it does."""

    def __init__(self, data: bytes) -> None:
        self._data = data
        self.place = 0

    def fields(self, depth: int = 0) -> dict[int, Any]:
        found: dict[int, Any] = {}
        number = 0
        while byte := self._byte():
            kind = byte & 15
            number = number + (byte >> 4) if byte >> 4 else self._signed()
            if kind in (1, 2):
                found[number] = kind == 1
            elif kind == 3:
                found[number] = self._byte()
            elif kind in (4, 5, 6):
                found[number] = self._signed()
            elif kind == 7:
                self.place += 8
            elif kind == 8:
                length = self._unsigned()
                self.place += length
            elif kind == 12 and depth < 3:
                found[number] = self.fields(depth + 1)
            else:
                raise ValueError("a page's header that is none")
        return found

    def _byte(self) -> int:
        byte = self._data[self.place]
        self.place += 1
        return byte

    def _unsigned(self) -> int:
        value = shift = 0
        while True:
            byte = self._byte()
            value |= (byte & 127) << shift
            shift += 7
            if byte < 128:
                return value
            if shift > 63:
                raise ValueError("a page's header that is none")

    def _signed(self) -> int:
        value = self._unsigned()
        return (value >> 1) ^ -(value & 1)
