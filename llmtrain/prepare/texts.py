"""Read documents of .txt and .jsonl files, and pairs of the lines of two files."""

from __future__ import annotations

import codecs
import json
from collections.abc import Iterator, Sequence
from itertools import zip_longest
from typing import Any

from llmtrain.errors import DataError, Problem
from llmtrain.prepare import source_file
from llmtrain.prepare.decompress import open_source
from llmtrain.prepare.source_file import (
    Pairs,
    Part,
    SourceFile,
    Texts,
    line_chunks,
    missing_field,
    open_lines,
    refuse_utf16,
)
from llmtrain.reading import LONGEST_NUMBER

AUTO_DOCUMENT_BYTES = 4096
"""Approximate size of a document of txt_document=auto."""
_BATCH_LINES = 4096


def read_whole(file: SourceFile) -> Iterator[list[bytes]]:
    """Yield the whole file as one document. Raise DataError if it is larger than LONGEST_LINE."""
    with open_source(file) as stream:
        text = stream.read(source_file.LONGEST_LINE + 1)
    refuse_utf16(text, file.name)
    if len(text) > source_file.LONGEST_LINE:
        raise DataError(
            Problem(
                file.name,
                f"a file of more than {source_file.LONGEST_LINE >> 20} MiB as one document",
                "",
                "txt_document=auto",
            )
        )
    yield [text.removeprefix(codecs.BOM_UTF8)]


def read_paragraphs(part: Part, pack: bool) -> Iterator[list[bytes]]:
    """Yield batches of paragraphs as documents or, with `pack`, of consecutive paragraphs of
    AUTO_DOCUMENT_BYTES together; a paragraph of twice that size is cut at a line end.

    Without `pack`, borders of parts do not cut paragraphs: a part begins and ends after the first blank line
    that follows its border.
    """
    file = part.file
    if pack:
        # A compressed file is a single part: cut at the same borders, so that it gives the same documents as
        # the uncompressed file.
        lines = _marked_lines(part, source_file.UNIT_BYTES if part.stop is None else None)
    else:
        lines = _whole_paragraph_lines(part)
    documents: list[bytes] = []
    batch_size = 0
    document: list[bytes] = []
    size = 0
    for line in lines:
        blank = not line or line.isspace()
        if document or not blank:
            document.append(line)
            size += len(line)
        if not blank and size > source_file.LONGEST_LINE:
            raise DataError(
                Problem(
                    file.name,
                    f"a paragraph of more than {source_file.LONGEST_LINE >> 20} MiB",
                    "",
                    "txt_document=auto",
                )
            )
        ends = not line or (
            (size >= AUTO_DOCUMENT_BYTES if blank else size >= 2 * AUTO_DOCUMENT_BYTES) if pack else blank
        )
        if ends and document:
            documents.append(b"".join(document))
            batch_size += size
            document, size = [], 0
        if batch_size >= source_file.BATCH_BYTES:
            yield documents
            documents, batch_size = [], 0
    if document:
        documents.append(b"".join(document))
    if documents:
        yield documents


def _marked_lines(part: Part, border: int | None) -> Iterator[bytes]:
    """Yield lines with their newline, and an empty line at each multiple of `border` bytes."""
    next_border = border
    for offset, data in line_chunks(part):
        lines = data.splitlines(keepends=True)
        if next_border is None:
            yield from lines
            continue
        for line in lines:
            if offset >= next_border:
                yield b""
                next_border += -(-(offset - next_border + 1) // border) * border  # type: ignore[operator]
            yield line
            offset += len(line)


def _whole_paragraph_lines(part: Part) -> Iterator[bytes]:
    reading = part.start == 0
    for offset, data in line_chunks(Part(part.file, part.start, part.file.size if part.stop else None)):
        for line in data.splitlines(keepends=True):
            past_stop = part.stop is not None and offset >= part.stop
            if reading:
                yield line
                if past_stop and line.isspace():
                    return
            elif line.isspace():
                reading = True
                if past_stop:
                    return
            offset += len(line)


def read_line_pairs(file: SourceFile, target: SourceFile) -> Iterator[Pairs]:
    """Yield each line of `file` with the same line of `target`. Raise DataError if the numbers of lines
    differ."""
    pairs: list[tuple[bytes, bytes]] = []
    size = 0
    for ours, theirs in zip_longest(_lines(file), _lines(target)):
        if ours is None or theirs is None:
            counts = [sum(1 for _ in _lines(each)) for each in (file, target)]
            allowed = f"{counts[0]:,}, one for each line of {file.name}"
            raise DataError(Problem(target.name, f"{counts[1]:,} lines", allowed))
        pairs.append((ours, theirs))
        size += len(ours) + len(theirs)
        if size >= source_file.BATCH_BYTES or len(pairs) == _BATCH_LINES:
            yield Pairs(*map(list, zip(*pairs, strict=True)))
            pairs, size = [], 0
    if pairs:
        yield Pairs(*map(list, zip(*pairs, strict=True)))


def _lines(file: SourceFile) -> Iterator[bytes]:
    with open_source(file) as stream:
        first = stream.readline(source_file.LONGEST_LINE)
    # A lone carriage return inside a line of one file would shift all following pairs, so these end lines
    # only if the first line shows that the file uses them.
    lone_returns = b"\r" in first and not first.endswith(b"\n")
    for _, data in line_chunks(Part(file), lone_returns):
        yield from data.removesuffix(b"\n").split(b"\n")


def read_jsonl(part: Part, names: Sequence[str]) -> Iterator[list[Texts]]:
    """Yield the texts of the named fields, one batch of lines at a time."""
    file = part.file
    keys = [json.dumps(name, ensure_ascii=False).encode() for name in names]
    for offset, data in line_chunks(part):
        if len(data) > source_file.BATCH_BYTES + source_file.longest_parsed():
            got = f"a line of more than {source_file.longest_parsed() >> 20} MiB"
            raise DataError(Problem(file.name, got, "shorter lines", "split it into smaller documents"))
        lines = data.decode().split("\n")
        try:
            if len(data) > source_file.MOST_VALUES:
                _refuse_many_values(lines)
            rows = [json.loads(line) for line in lines if line and not line.isspace()]
            if any(data.count(key) > len(rows) for key in keys):
                # The key occurs more than once in some line: inside a value, or as a duplicate field.
                rows = [parse_object(line, names) for line in lines if line and not line.isspace()]
            columns: list[Texts] = []
            for name in names:
                texts = [row[name] for row in rows]
                if not all(type(text) is str for text in texts):
                    texts = [_text_or_empty(text) for text in texts]
                columns.append(texts)
        except (ValueError, KeyError, TypeError, IndexError, RecursionError) as error:
            raise _jsonl_error(file, offset, lines, names) from error
        yield columns


def _refuse_many_values(lines: Sequence[str]) -> None:
    """Raise ValueError for a long line with so many values that they may exceed memory."""
    for line in lines:
        if len(line) > source_file.MOST_VALUES and sum(map(line.count, ",[{")) > source_file.MOST_VALUES:
            raise ValueError(
                f"more than {source_file.MOST_VALUES:,} commas and brackets in {len(line):,} characters"
            )


def parse_object(line: str, names: Sequence[str]) -> Any:
    """Parse as json.loads does. Raise ValueError for an object with duplicate fields among `names`."""
    _refuse_many_values([line])
    top: list[tuple[str, Any]] = []

    def take(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        # The outermost object is the last to be completed.
        top[:] = pairs
        return dict(pairs)

    value = json.loads(line, object_pairs_hook=take)
    if isinstance(value, dict):
        found = [name for name, _ in top]
        for name in names:
            if found.count(name) > 1:
                raise ValueError(f"field {name} {found.count(name)} times")
    return value


def _text_or_empty(value: Any) -> str:
    if value is None:
        return ""
    if not isinstance(value, str):
        raise TypeError(type(value).__name__)
    return value


def _jsonl_error(file: SourceFile, offset: int, lines: list[str], names: Sequence[str]) -> DataError:
    before = 0
    with open_lines(file) as stream:
        remaining = offset
        while remaining and (data := stream.read(min(source_file.BATCH_BYTES, remaining))):
            before += data.count(b"\n")
            remaining -= len(data)
    for number, line in enumerate(lines, before + 1):
        if line and not line.isspace():
            try:
                text_of_object(line, f"{file.name} line {number}", names, "one JSON object a line")
            except DataError as error:
                return error
    raise AssertionError(f"{file.name}: no faulty line found")


def text_of_object(text: str, where: str, names: Sequence[str], allowed: str) -> list[str]:
    """Return the texts of the named fields of one JSON object, "" for null. Raise DataError that names
    `where`."""
    row = parse_record(text, where, names, allowed)
    if not set(names) <= set(row):
        raise missing_field(where, names, list(row))
    for name in names:
        if not isinstance(row[name], str | None):
            got = f"field {name} that is a {type(row[name]).__name__}"
            raise DataError(Problem(where, got, "text or null"))
    return [row[name] or "" for name in names]


def parse_record(
    text: str, where: str, names: Sequence[str] = (), allowed: str = "one JSON object a line"
) -> dict[str, Any]:
    """Return the fields of one JSON object; those of `names` may be there only once. Raise DataError that
    names `where`."""
    remedy = "write one element per line: jq -c '.[]'" if text.lstrip().startswith("[") else ""
    try:
        row = parse_object(text, names)
    except json.JSONDecodeError as error:
        raise DataError(Problem(where, f"invalid JSON ({error})", allowed, remedy)) from error
    except RecursionError as error:
        got = "JSON that is nested too deeply"
        raise DataError(Problem(where, got, allowed, "write the nested values as text")) from error
    except ValueError as error:
        # Python's message names a setting of Python.
        got = (
            f"a number of more than {LONGEST_NUMBER:,} digits" if "int_max_str" in str(error) else str(error)
        )
        raise DataError(Problem(where, f"invalid JSON ({got})", allowed)) from error
    if not isinstance(row, dict):
        raise DataError(Problem(where, f"a JSON {type(row).__name__}", allowed, remedy))
    return row
