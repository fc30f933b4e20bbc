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

from llmtrain.prepare.parquet_footer import Struct, number_of

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

    Raise ValueError, with a short reason, for a page that is none or larger than PAGE_BYTES.
    """
    dictionary_bytes = seen = 0
    while seen < num_values and start < stop:
        header, length = _header(descriptor, start, stop)
        kind, unpacked, packed = (number_of(header, field) for field in (1, 2, 3))
        if min(unpacked, packed) < 0:
            raise ValueError(f"a page of {min(unpacked, packed):,} bytes")
        if unpacked > PAGE_BYTES:
            raise ValueError(f"a page of {unpacked:,} bytes, more than {PAGE_BYTES:,}")
        start += length + packed
        if kind == _DICTIONARY_PAGE:
            dictionary_bytes = unpacked
            count = number_of(header.get(7), 1)
            if count * 4 > unpacked:
                raise ValueError(f"{unpacked:,} bytes of a dictionary of {count:,} values")
        elif kind in (_DATA_PAGE, _DATA_PAGE_V2):
            described = header.get(5 if kind == _DATA_PAGE else 8)
            count, encoding = number_of(described, 1), number_of(described, 2 if kind == _DATA_PAGE else 4)
            if count < 0:
                raise ValueError(f"a page of {count:,} values")
            seen += count
            each = dictionary_bytes if encoding in _DICTIONARY_CODED else unpacked
            yield Page(count, unpacked, 0 if encoding in (_PLAIN, _DELTA_LENGTHS) else each)


def _header(descriptor: int, start: int, stop: int) -> tuple[dict[int, Any], int]:
    """(fields by number, bytes) of the page's header at `start`."""
    for size in _HEADER_BYTES:
        data = os.pread(descriptor, min(size, stop - start), start)
        struct = Struct(data)
        try:
            return struct.fields(), struct.place
        except IndexError:
            if len(data) < size:
                break
    raise ValueError(f"no page at byte {start:,}")
