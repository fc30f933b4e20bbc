"""Bound the memory that the pages of a parquet file need, before any of them is decompressed.

Pages are compressed, and values may be indices into a dictionary or extend the value before, so a page of a
few bytes may expand to billions. The bound is computed from the page headers (parquet.thrift, PageHeader);
the reader checks the stated sizes when it decompresses a page.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np

from llmtrain.prepare.parquet_footer import Struct, number_of

PAGE_BYTES = 128 << 20
"""Maximum bytes of an uncompressed page; most writers use 1 MB, none more than 100 MB."""
BATCH_BYTES = 128 << 20
"""Maximum bytes of the rows that are read at a time, if a single row does not need more."""
MOST_ROWS = 512
"""Maximum number of rows that are read at a time."""
_HEADER_BYTES = (256, 1 << 16, 16 << 20)
"""Bytes read for a page header, increased until it is complete; the last is the limit of Arrow."""
_DATA_PAGE, _DICTIONARY_PAGE, _DATA_PAGE_V2 = 0, 2, 3
_PLAIN, _DELTA_LENGTHS = 0, 6
_DICTIONARY_CODED = (2, 8)


@dataclass(frozen=True)
class Page:
    num_rows: int
    num_bytes: int
    """Bytes of all its values, if each is stored in the page itself."""
    bytes_each: int
    """Maximum bytes of a value, if values are built from a dictionary or earlier values; else 0."""


def rows_at_a_time(pages: list[Page]) -> int:
    """Return how many consecutive rows, starting anywhere, fit in BATCH_BYTES; at most MOST_ROWS."""
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
    """Yield the data pages of a column chunk of `num_values` values at bytes [start, stop) of the file.

    Raise ValueError, with a short reason, for a page that is damaged or larger than PAGE_BYTES.
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
    """Return (fields by number, length in bytes) of the page header at `start`."""
    for size in _HEADER_BYTES:
        data = os.pread(descriptor, min(size, stop - start), start)
        struct = Struct(data)
        try:
            return struct.fields(), struct.offset
        except IndexError:
            if len(data) < size:
                break
    raise ValueError(f"no page at byte {start:,}")
