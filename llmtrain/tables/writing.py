"""Write rows as .jsonl, .csv, .tsv or .parquet: chunks as JSON lines first, joined in order at the end."""

from __future__ import annotations

import csv
import io
import json
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import IO, Any

from llmtrain.files import atomic_writer, write_atomically

SUFFIXES = (".jsonl", ".csv", ".tsv", ".parquet")
"""Endings of the names of tables that can be written."""
_ROWS_OF_A_GROUP = 65_536


def write_chunk(path: Path, rows: Sequence[Mapping[str, Any]]) -> None:
    """Write rows as JSON lines, whole or not at all."""
    lines = (json.dumps(row, ensure_ascii=False, default=str) + "\n" for row in rows)
    write_atomically(path, "".join(lines))


def join_chunks(chunks: Sequence[Path], output: Path) -> None:
    """Write the rows of all chunks in order, in the form that the name of `output` says."""
    with atomic_writer(output) as file:
        if output.suffix == ".jsonl":
            for chunk in chunks:
                file.write(chunk.read_bytes())
        elif output.suffix == ".parquet":
            _write_parquet(chunks, file)
        else:
            _write_delimited(chunks, file, "\t" if output.suffix == ".tsv" else ",")


def _rows(chunks: Sequence[Path]) -> Iterator[dict[str, Any]]:
    for chunk in chunks:
        with open(chunk, encoding="utf-8") as lines:
            yield from map(json.loads, lines)


def _write_delimited(chunks: Sequence[Path], file: IO[bytes], delimiter: str) -> None:
    """Write the fields of all rows as columns; lists and objects as JSON."""
    names = list(dict.fromkeys(name for row in _rows(chunks) for name in row))
    text = io.TextIOWrapper(file, encoding="utf-8", newline="", write_through=True)
    writer = csv.writer(text, delimiter=delimiter, lineterminator="\n")
    writer.writerow(names)
    for row in _rows(chunks):
        writer.writerow([_as_cell(row.get(name)) for name in names])
    text.detach()


def _as_cell(value: Any) -> Any:
    return json.dumps(value, ensure_ascii=False) if isinstance(value, list | dict) else value


def _write_parquet(chunks: Sequence[Path], file: IO[bytes]) -> None:
    import pyarrow
    import pyarrow.parquet

    schema = pyarrow.unify_schemas(
        [pyarrow.Table.from_pylist(list(_rows([chunk]))).schema for chunk in chunks],
        promote_options="permissive",
    )
    with pyarrow.parquet.ParquetWriter(file, schema) as writer:
        for chunk in chunks:
            table = pyarrow.Table.from_pylist(list(_rows([chunk])), schema=schema)
            writer.write_table(table, row_group_size=_ROWS_OF_A_GROUP)
