"""Documents of .parquet files."""

from __future__ import annotations

import os
import re
import shutil
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import IO, Any

from llmtrain.data.preparation import streams
from llmtrain.data.preparation.opening import open_source
from llmtrain.data.preparation.streams import Part, SourceFile, Texts, missing_field
from llmtrain.errors import DataError, Problem


def read_parquet(part: Part, names: Sequence[str], scratch: Path) -> Iterator[list[Texts]]:
    """The columns of these names, a batch of rows at a time."""
    file, temporary = part.file, None
    if file.compression:
        # Parquet is read from its end, which a compressed stream does not offer.
        temporary = scratch / f"{os.getpid()}.parquet"
        with open_source(file) as packed, open(temporary, "wb") as plain:
            shutil.copyfileobj(packed, plain, streams.BATCH_BYTES)
    try:
        with open(temporary, "rb") if temporary else open_source(file) as stream:
            parquet = open_parquet(file, stream)
            _check_columns(file, parquet.schema_arrow, names)
            row = sum(parquet.metadata.row_group(group).num_rows for group in range(part.start))
            groups = range(part.start, parquet.num_row_groups if part.stop is None else part.stop)
            batches = parquet.iter_batches(512, row_groups=list(groups), columns=[*names], use_threads=False)
            while (batch := _next(batches, f"{file.name} row {row + 1:,} or later")) is not None:
                # The file gives them in its own order.
                yield [_texts(batch.column(name), file, row, name) for name in names]
                row += batch.num_rows
    finally:
        if temporary is not None:
            temporary.unlink(missing_ok=True)


def open_parquet(file: SourceFile, stream: IO[bytes]) -> Any:
    """pyarrow's ParquetFile of an open file: its path need not be UTF-8, as pyarrow demands."""
    import pyarrow.parquet

    with _arrow_errors(file.name, "no parquet file"):
        return pyarrow.parquet.ParquetFile(stream, pre_buffer=False)


def _check_columns(file: SourceFile, schema: Any, names: Sequence[str]) -> None:
    import pyarrow

    if not set(names) <= set(schema.names):
        raise missing_field(file.name, names, schema.names)
    for name in names:
        if schema.names.count(name) > 1:
            got = f"{schema.names.count(name)} columns of the name {name}"
            raise DataError(Problem(file.name, got, "one", "rename the others"))
        kind = schema.field(name).type
        value = kind.value_type if pyarrow.types.is_dictionary(kind) else kind
        if not re.match(r"(large_)?(string|binary)(_view)?$|null$", str(value)):
            raise DataError(Problem(file.name, f"field {name} of type {kind}", "text"))


def _texts(column: Any, file: SourceFile, row: int, name: str) -> list[bytes]:
    """Values of a column in UTF-8, with empty ones for those that are missing; `row` is the first's."""
    import pyarrow

    if pyarrow.types.is_dictionary(column.type):
        column = column.dictionary_decode()
    column = column.cast(pyarrow.large_binary())
    values = [value or b"" for value in column.to_pylist()]
    try:
        column.cast(pyarrow.large_string())
    except pyarrow.ArrowInvalid:
        for number, value in enumerate(values, row + 1):
            streams.decoded(value, f"{file.name} row {number:,} field {name}")
    return values


def _next(batches: Iterator[Any], where: str) -> Any:
    with _arrow_errors(where, "damaged parquet data"):
        return next(batches, None)


@contextmanager
def _arrow_errors(where: str, got: str) -> Iterator[None]:
    import pyarrow

    try:
        yield
    except (pyarrow.ArrowException, OSError) as error:
        reason = (str(error).splitlines() or [type(error).__name__])[0]
        raise DataError(Problem(where, f"{got} ({reason})", "", "copy or download it again")) from error
