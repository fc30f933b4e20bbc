"""Documents of .csv, .tsv and .parquet files."""

from __future__ import annotations

import csv
import io
import os
import re
import shutil
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from llmtrain.data.preparation import streams
from llmtrain.data.preparation.streams import (
    Part,
    SourceFile,
    Texts,
    missing_field,
    open_source,
)
from llmtrain.errors import DataError, Problem


def read_csv(file: SourceFile, names: Sequence[str]) -> Iterator[list[Texts]]:
    """The columns of these names, a batch of rows at a time. In .tsv nothing is quoted: a value is what
    stands between two tabs."""
    import pyarrow
    import pyarrow.csv

    with open_source(file) as stream, io.TextIOWrapper(stream, encoding="utf-8-sig", newline="") as text:
        csv.field_size_limit(streams.LONGEST_LINE)
        try:
            is_tsv = file.kind == "tsv"
            dialect: dict[str, Any] = {"delimiter": "\t", "quoting": csv.QUOTE_NONE} if is_tsv else {}
            header = next(csv.reader(text, **dialect), None)
        except csv.Error as error:
            raise DataError(
                Problem(f"{file.name} header", f"no CSV ({error})", "names of the columns")
            ) from error
    if header is None:
        return
    if not set(names) <= set(header):
        raise missing_field(f"{file.name} header", names, header)
    convert = pyarrow.csv.ConvertOptions(
        include_columns=[*names], column_types=dict.fromkeys(names, pyarrow.binary())
    )
    parse = pyarrow.csv.ParseOptions(newlines_in_values=True)
    if is_tsv:
        parse = pyarrow.csv.ParseOptions(delimiter="\t", quote_char=False)
    block_size, done = streams.BATCH_BYTES, 0
    while True:
        read = pyarrow.csv.ReadOptions(use_threads=False, block_size=block_size)
        try:
            with open_source(file) as stream:
                skip = done
                for batch in pyarrow.csv.open_csv(stream, read, parse, convert):
                    if skip:
                        taken = min(skip, batch.num_rows)
                        skip -= taken
                        batch = batch.slice(taken)
                    if batch.num_rows:
                        done += batch.num_rows
                        yield [column.to_pylist() for column in batch.columns]
            return
        except pyarrow.ArrowInvalid as error:
            message = str(error)
            too_long = "straddl" in message or "Empty CSV file or block" in message
            if too_long and block_size < streams.LONGEST_LINE:
                # A row or the header is longer than the block: read on from there with a longer one.
                block_size *= 16
                continue
            raise DataError(
                Problem(file.name, message.splitlines()[0], "as many values in every row as in the header")
            ) from error


def read_parquet(part: Part, names: Sequence[str], scratch: Path) -> Iterator[list[Texts]]:
    """The columns of these names, a batch of rows at a time."""
    import pyarrow

    file, path, temporary = part.file, part.file.path, None
    if file.compression:
        # Parquet is read from its end, which a compressed stream does not offer.
        temporary = path = scratch / f"{os.getpid()}.parquet"
        with open_source(file) as packed, open(path, "wb") as plain:
            shutil.copyfileobj(packed, plain, streams.BATCH_BYTES)
    try:
        parquet = open_parquet(file, path)
        if not set(names) <= set(parquet.schema_arrow.names):
            raise missing_field(file.name, names, parquet.schema_arrow.names)
        for name in names:
            kind = parquet.schema_arrow.field(name).type
            value = kind.value_type if pyarrow.types.is_dictionary(kind) else kind
            if not re.match(r"(large_)?(string|binary)(_view)?$|null$", str(value)):
                raise DataError(Problem(file.name, f"field {name} of type {kind}", "text"))
        groups = range(part.start, parquet.num_row_groups if part.stop is None else part.stop)
        for batch in parquet.iter_batches(512, row_groups=list(groups), columns=[*names], use_threads=False):
            # The file gives them in its own order.
            yield [_texts(batch.column(name).to_pylist()) for name in names]
    except (pyarrow.ArrowInvalid, OSError) as error:
        if isinstance(error, OSError) and error.errno is not None:
            raise
        raise DataError(Problem(file.name, f"damaged parquet data ({str(error).splitlines()[0]})")) from error
    finally:
        if temporary is not None:
            temporary.unlink(missing_ok=True)


def _texts(values: list[Any]) -> list[Any]:
    """With empty ones for those that are missing."""
    empty = b"" if any(isinstance(value, bytes) for value in values) else ""
    return [empty if value is None else value for value in values]


def open_parquet(file: SourceFile, path: Path) -> Any:
    import pyarrow
    import pyarrow.parquet

    try:
        return pyarrow.parquet.ParquetFile(path, pre_buffer=False)
    except (pyarrow.ArrowInvalid, OSError) as error:
        if isinstance(error, OSError) and error.errno is not None:
            raise
        raise DataError(
            Problem(
                file.name, f"no parquet file ({str(error).splitlines()[0]})", "", "copy or download it again"
            )
        ) from error
