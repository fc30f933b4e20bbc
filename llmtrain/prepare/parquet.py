"""Read documents of .parquet files, in bounded memory."""

from __future__ import annotations

import os
import re
import shutil
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import IO, Any

from llmtrain.errors import DataError, Problem
from llmtrain.prepare import source_file
from llmtrain.prepare.decompress import Allowance, open_source, read_errors
from llmtrain.prepare.parquet_footer import RowGroup, row_groups
from llmtrain.prepare.parquet_pages import MOST_ROWS, Page, pages_of, rows_at_a_time
from llmtrain.prepare.source_file import Part, SourceFile, Texts, missing_field
from llmtrain.reading import open_regular

LONGEST_FOOTER = 16 << 20
"""Maximum bytes of the footer, the list of row groups and columns; in memory it is about 100 times as
large."""
MOST_IN_FOOTER = 100_000
"""Maximum number of row groups or columns; the reader allocates memory for all before it reads them."""
_PIECE_BYTES = 8 << 20
_ROW_BYTES = 8
"""Bytes counted per row in addition to its text: empty rows need time and memory too."""
_TAIL_BYTES = 8
"""Length of the footer and magic number."""


def read_parquet(part: Part, names: Sequence[str], scratch: Path) -> Iterator[list[Texts]]:
    """Yield the texts of the named columns, one batch of rows at a time.

    scratch: folder for the uncompressed copy of a compressed file.
    """
    file = part.file
    with unpacked_parquet(file, scratch) as plain, open_source(plain) as stream:
        parquet = open_parquet(file, stream)
        _check_columns(file, parquet.schema_arrow, names)
        listed = _row_groups(file, stream, names)
        row = sum(group.num_rows for group in listed[: part.start])
        groups = range(part.start, len(listed) if part.stop is None else part.stop)
        rows = _rows_at_a_time(file, plain.path, listed, groups)
        batches = parquet.iter_batches(rows, row_groups=list(groups), columns=[*names], use_threads=False)
        allowance = Allowance(file.name, file.size, "bytes of rows")
        gathered: list[list[bytes]] = [[] for _ in names]
        size = 0
        while (batch := _next(batches, f"{file.name} row {row + 1:,} or later")) is not None:
            # Convert piece by piece: as Python objects, all rows of a batch would need several times its
            # memory.
            step = max(1, batch.num_rows * _PIECE_BYTES // max(batch.nbytes, 1))
            for first in range(0, batch.num_rows, step):
                piece = batch.slice(first, step)
                taken = 0
                for texts, name in zip(gathered, names, strict=True):
                    # Select by name: batches have the columns in the order of the file.
                    found = _texts(piece.column(name), file, row, name)
                    taken += sum(map(len, found)) + _ROW_BYTES * len(found)
                    texts += found
                row += piece.num_rows
                size += taken
                allowance.take(taken)
                if size >= _PIECE_BYTES or len(gathered[0]) >= MOST_ROWS:
                    yield [*gathered]
                    gathered, size = [[] for _ in names], 0
        if gathered[0]:
            yield [*gathered]


@contextmanager
def unpacked_parquet(file: SourceFile, scratch: Path) -> Iterator[SourceFile]:
    """Yield the file uncompressed, under the same name for messages: reading parquet starts at its end, which
    needs a seekable file."""
    if not file.compression:
        yield file
        return
    path = scratch / "unpacked.parquet"
    left = shutil.disk_usage(scratch).free * 9 // 10
    try:
        with open_source(file) as packed, open(path, "xb") as plain:
            while data := packed.read(source_file.BATCH_BYTES):
                left -= len(data)
                if left < 0:
                    got = f"more than {plain.tell():,} bytes of unpacked data"
                    allowed = "90% of the free space on the disk of output"
                    remedy = "free disk space, or choose another output"
                    raise DataError(Problem(file.name, got, allowed, remedy))
                plain.write(data)
        yield replace(file, path=path, compression="")
    finally:
        path.unlink(missing_ok=True)


def open_parquet(file: SourceFile, stream: IO[bytes]) -> Any:
    """Return the pyarrow ParquetFile of an open file; given a path, pyarrow would require it to be UTF-8."""
    import pyarrow.parquet

    length = _footer_length(stream)
    if length > LONGEST_FOOTER:
        got, allowed = f"a list of row groups of {length:,} bytes", f"{LONGEST_FOOTER:,}"
        raise DataError(Problem(file.name, got, allowed, "write it again in larger row groups"))
    with _arrow_errors(file.name, "an invalid parquet file"):
        return pyarrow.parquet.ParquetFile(
            stream, pre_buffer=False, thrift_container_size_limit=MOST_IN_FOOTER
        )


def row_group_sizes(file: SourceFile) -> list[int]:
    """Return the uncompressed bytes of each row group, as stated in the footer."""
    with open_source(file) as stream:
        # Raises the error for a file that is not parquet.
        open_parquet(file, stream)
        return [group.num_bytes for group in _row_groups(file, stream, ())]


def _footer_length(stream: IO[bytes]) -> int:
    """Return the length of the footer in bytes, 0 if the file is not parquet."""
    if stream.seek(0, os.SEEK_END) < _TAIL_BYTES:
        return 0
    stream.seek(-_TAIL_BYTES, os.SEEK_END)
    tail = stream.read(_TAIL_BYTES)
    return int.from_bytes(tail[:4], "little") if tail[4:] == b"PAR1" else 0


def _row_groups(file: SourceFile, stream: IO[bytes], names: Sequence[str]) -> list[RowGroup]:
    length = _footer_length(stream)
    stream.seek(-_TAIL_BYTES - length, os.SEEK_END)
    try:
        return list(row_groups(stream.read(length), names))
    except ValueError as error:
        got = f"an invalid parquet file ({error})"
        raise DataError(Problem(file.name, got, "", "copy or download it again")) from error


def _rows_at_a_time(file: SourceFile, path: Path, found: list[RowGroup], groups: range) -> int:
    """Return how many rows of all columns can be read at a time in bounded memory. Raise DataError for pages
    that are too large or damaged."""
    pages: dict[str, list[Page]] = {}
    with read_errors(file), open(path, "rb", opener=open_regular) as stream:
        size = os.fstat(stream.fileno()).st_size
        for group in groups:
            for chunk in found[group].chunks:
                stop = min(size, chunk.start + chunk.num_bytes)
                try:
                    pages.setdefault(chunk.column, []).extend(
                        pages_of(stream.fileno(), chunk.start, stop, chunk.num_values)
                    )
                except ValueError as error:
                    row = sum(before.num_rows for before in found[:group])
                    got = f"damaged parquet data ({error})"
                    remedy = "copy or download it again, or write it with smaller pages"
                    raise DataError(
                        Problem(f"{file.name} row {row + 1:,} or later", got, "", remedy)
                    ) from error
    return max(min(map(rows_at_a_time, pages.values()), default=MOST_ROWS) // max(len(pages), 1), 1)


def _check_columns(file: SourceFile, schema: Any, names: Sequence[str]) -> None:
    import pyarrow

    with _arrow_errors(file.name, "an invalid parquet file"):
        found = list(schema.names)
    if not set(names) <= set(found):
        raise missing_field(file.name, names, found)
    for name in names:
        if found.count(name) > 1:
            got = f"{found.count(name)} columns of the name {name}"
            raise DataError(Problem(file.name, got, "one", "rename the others"))
        kind = schema.field(name).type
        value = kind.value_type if pyarrow.types.is_dictionary(kind) else kind
        if not re.match(r"(large_)?(string|binary)(_view)?$|null$", str(value)):
            raise DataError(Problem(file.name, f"field {name} of type {kind}", "text"))


def _texts(column: Any, file: SourceFile, row: int, name: str) -> list[bytes]:
    """Return the values of a column as UTF-8, b"" for null. row: number of the first value, for messages."""
    import pyarrow

    if pyarrow.types.is_dictionary(column.type):
        column = column.dictionary_decode()
    column = column.cast(pyarrow.large_binary())
    values = [value or b"" for value in column.to_pylist()]
    try:
        column.cast(pyarrow.large_string())
    except pyarrow.ArrowInvalid:
        for number, value in enumerate(values, row + 1):
            source_file.decoded(value, f"{file.name} row {number:,} field {name}")
    return values


def _next(batches: Iterator[Any], where: str) -> Any:
    with _arrow_errors(where, "damaged parquet data"):
        return next(batches, None)


@contextmanager
def _arrow_errors(where: str, got: str) -> Iterator[None]:
    import pyarrow

    try:
        yield
    except (pyarrow.ArrowException, OSError, UnicodeDecodeError) as error:
        reason = (str(error).splitlines() or [type(error).__name__])[0]
        raise DataError(Problem(where, f"{got} ({reason})", "", "copy or download it again")) from error
