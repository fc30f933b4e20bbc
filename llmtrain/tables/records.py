"""Read the rows of a table as the file has them: csv, tsv, JSON lines, parquet, CoNLL columns, SQuAD JSON."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator, Mapping, Sequence
from itertools import chain
from pathlib import Path
from typing import Any, NamedTuple

from llmtrain.errors import DataError, Problem
from llmtrain.prepare import source_file
from llmtrain.prepare.clean import CleanCounts
from llmtrain.prepare.decompress import open_source
from llmtrain.prepare.delimited import Rows, other_width
from llmtrain.prepare.folder_scan import short_name
from llmtrain.prepare.parquet import open_parquet, unpacked_parquet
from llmtrain.prepare.source_file import Part, SourceFile, decoded, line_chunks
from llmtrain.prepare.texts import parse_record

FORMS = ("csv", "tsv", "jsonl", "parquet", "conll", "json")
"""Forms of tables. json: a whole document, such as SQuAD's or a list of objects, or JSON lines."""
_ROWS_AT_A_TIME = 1024
_TAG = re.compile(r"O|[BIESLUM]-.+|[BIESLUM]")
_LARGEST_JSON = 1 << 30
"""Maximum bytes of a .json that is one document."""


class Record(NamedTuple):
    """One row of a table."""

    line: int
    """Number of its first line, from 1; in a parquet file, of the row; in a JSON document, of the item."""
    values: dict[str, Any]
    """Field → value: text from csv, tsv and CoNLL, any JSON value else."""


def read_records(
    file: SourceFile, *, quoting: str = "auto", header: bool = True, scratch: Path | None = None
) -> Iterator[Record]:
    """Yield the rows of a file in order.

    quoting: as in the configuration of `llmtrain prepare`; header: whether the first line of a csv or tsv
    names its columns, which are else named "0", "1", …; scratch: a folder for an unpacked copy of a
    compressed parquet file.
    Raise DataError that names file and line.
    """
    if file.kind in ("csv", "tsv"):
        yield from _delimited(file, quoting, header)
    elif file.kind == "jsonl":
        yield from _json_lines(file)
    elif file.kind == "parquet":
        yield from _parquet(file, scratch or Path("."))
    elif file.kind == "conll":
        yield from _columns(file)
    else:
        yield from _json(file)


def field_of(values: Mapping[str, Any], name: str) -> Any:
    """Return the value of a field. Raise ValueError if the row has none of this name."""
    if name not in values:
        fields = ", ".join(str(field)[:40] for field in list(values)[:24])
        raise ValueError(f"no field {name}", fields or "(no fields)")
    return values[name]


def name_of(file: SourceFile, line: int) -> str:
    """Name a row in messages."""
    unit = {"parquet": "row", "json": "item"}.get(file.kind, "line")
    return f"{file.name} {unit} {line:,}"


def _delimited(file: SourceFile, quoting: str, header: bool) -> Iterator[Record]:
    quoted = quoting == "double" or (quoting == "auto" and file.kind == "csv")
    rows = Rows(file, quoted, CleanCounts())
    with open_source(file) as stream:
        reading = rows.read(stream)
        first = next(reading, None)
        if first is None:
            return
        names = [_text(file, first[0], value).strip() for value in first[1]]
        if not header:
            names = [str(number) for number in range(len(first[1]))]
            reading = chain([first], reading)
        elif len(set(names)) < len(names):
            twice = next(name for name in names if names.count(name) > 1)
            raise DataError(
                Problem(f"{file.name} header", f"field {short_name(twice)} twice", "each field once")
            )
        for line, row in reading:
            if len(row) != len(names):
                raise other_width(file, line, row, len(names), quoted)
            values = (_text(file, line, value) for value in row)
            yield Record(line, dict(zip(names, values, strict=True)))


def _text(file: SourceFile, line: int, value: str) -> str:
    """Return the text of a value that was read as Latin-1."""
    return value if value.isascii() else decoded(value.encode("latin-1"), f"{file.name} line {line}")


def _json_lines(file: SourceFile) -> Iterator[Record]:
    number = 0
    for _, data in line_chunks(Part(file)):
        for line in data.removesuffix(b"\n").split(b"\n"):
            number += 1
            if line and not line.isspace():
                where = f"{file.name} line {number:,}"
                if len(line) > source_file.longest_parsed():
                    got = f"a line of more than {source_file.longest_parsed() >> 20} MiB"
                    raise DataError(Problem(where, got, "shorter lines"))
                yield Record(number, parse_record(decoded(line, where), where))


def _parquet(file: SourceFile, scratch: Path) -> Iterator[Record]:
    import pyarrow

    with unpacked_parquet(file, scratch) as plain, open_source(plain) as stream:
        table = open_parquet(file, stream)
        row = 0
        try:
            for batch in table.iter_batches(_ROWS_AT_A_TIME, use_threads=False):
                for values in batch.to_pylist():
                    row += 1
                    yield Record(row, values)
        except (pyarrow.ArrowException, OSError, UnicodeDecodeError) as error:
            reason = (str(error).splitlines() or [type(error).__name__])[0]
            where = f"{file.name} row {row + 1:,} or later"
            raise DataError(
                Problem(where, f"damaged parquet data ({reason})", "", "copy or download it again")
            ) from error


# ---------------------------------------------------------------------------------------------- CoNLL


def _columns(file: SourceFile) -> Iterator[Record]:
    """Yield the sentences of a file of one word a line and blank lines between sentences: each column as a
    list under its number, and "tokens" and "tags" for those that look like words and tags."""
    lines: list[str] = []
    first = number = 0
    for _, data in line_chunks(Part(file)):
        for raw in data.removesuffix(b"\n").split(b"\n"):
            number += 1
            line = decoded(raw, f"{file.name} line {number:,}").rstrip("\r")
            if not line.strip() or line.startswith("-DOCSTART-"):
                if lines:
                    yield _sentence(file, first, lines)
                lines = []
            elif not (line.startswith("#") and not lines):
                first = first if lines else number
                lines.append(line)
    if lines:
        yield _sentence(file, first, lines)


def _sentence(file: SourceFile, first: int, lines: Sequence[str]) -> Record:
    separator = "\t" if all("\t" in line for line in lines) else None
    rows = [line.split(separator) for line in lines]
    width = len(rows[0])
    for line, row in enumerate(rows, first):
        if len(row) != width or width < 1:
            allowed = f"{width}, as in the lines before it"
            raise DataError(Problem(f"{file.name} line {line:,}", f"{len(row)} columns", allowed))
    columns = [list(column) for column in zip(*rows, strict=True)]
    values: dict[str, Any] = {str(number): column for number, column in enumerate(columns)}
    # Universal NER and the like number the words in a first column and comment on the tags in later ones.
    is_numbered = width > 2 and columns[0] == [str(i) for i in range(1, len(rows) + 1)]
    tags = [number for number in range(1, width) if all(map(_TAG.fullmatch, columns[number]))]
    values["tokens"] = columns[1 if is_numbered else 0]
    if tags:
        values["tags"] = columns[tags[0] if is_numbered else tags[-1]]
    return Record(first, values)


# ----------------------------------------------------------------------------------------------- JSON


def _json(file: SourceFile) -> Iterator[Record]:
    with open_source(file) as stream:
        start = stream.peek(1 << 16)[: 1 << 16]  # type: ignore[attr-defined]
        line = start.split(b"\n", 1)[0]
        try:
            begins_with = json.loads(line)
        except ValueError:
            begins_with = None
        if isinstance(begins_with, dict) and not isinstance(begins_with.get("data"), list):
            yield from _json_lines(file)
            return
        content = stream.read(_LARGEST_JSON + 1)
    if len(content) > _LARGEST_JSON:
        got = f"a document of more than {_LARGEST_JSON >> 30} GiB"
        raise DataError(Problem(file.name, got, "JSON lines", "write one object per line, as .jsonl"))
    try:
        document = json.loads(decoded(content.removeprefix(b"\xef\xbb\xbf"), file.name))
    except (ValueError, RecursionError) as error:
        raise DataError(Problem(file.name, f"invalid JSON ({error})", "JSON")) from error
    if isinstance(document, dict) and isinstance(document.get("data"), list):
        items = _squad(file, document["data"])
    elif isinstance(document, list):
        items = iter(document)
    else:
        got = f"a JSON {type(document).__name__}"
        raise DataError(Problem(file.name, got, "a list of objects, JSON lines, or SQuAD's form"))
    for number, item in enumerate(items, 1):
        if not isinstance(item, dict):
            got = f"a JSON {type(item).__name__}"
            raise DataError(Problem(name_of(file, number), got, "an object"))
        yield Record(number, item)


def _squad(file: SourceFile, articles: Sequence[Any]) -> Iterator[dict[str, Any]]:
    """Yield each question of SQuAD's form (arXiv:1606.05250, 1806.03822) as a row of its own."""
    try:
        for number, article in enumerate(articles):
            for paragraph in article["paragraphs"]:
                for question in paragraph["qas"]:
                    yield {
                        "id": question.get("id"),
                        "title": article.get("title") or f"article {number}",
                        "context": paragraph["context"],
                        "question": question["question"],
                        "answers": question.get("answers", []),
                        "is_impossible": question.get("is_impossible", False),
                    }
    except (KeyError, TypeError, AttributeError) as error:
        allowed = "data › paragraphs › context and qas › question and answers"
        raise DataError(Problem(file.name, f"another form of JSON ({error!r})", allowed)) from error
