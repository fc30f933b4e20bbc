"""Read documents of .csv and .tsv files. A row with another number of values than the header is an error."""

from __future__ import annotations

import csv
import io
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import chain
from typing import Any

from llmtrain.errors import DataError, Problem
from llmtrain.prepare import source_file
from llmtrain.prepare.clean import CleanCounts
from llmtrain.prepare.decompress import open_source
from llmtrain.prepare.folder_scan import short_name
from llmtrain.prepare.source_file import SourceFile, Texts, missing_field, refuse_utf16

QUOTED = "give quoting=double if values are quoted, in a run data.quoting=double"
"""The remedy for a file whose quotes were read as text."""
LIKE_ROWS = 4
"""Minimum number of delimiters in a multi-line value, placed as in rows, at which its lines look like
rows."""


def read_delimited(
    file: SourceFile, names: Sequence[str], quoting: str, counts: CleanCounts
) -> Iterator[list[Texts]]:
    """Yield the texts of the named columns, one batch of rows at a time.

    quoting: PrepareConfig.quoting; counts: updated with values that suggest another quoting.
    Raise DataError that names file and line.
    """
    quoted = quoting == "double" or (quoting == "auto" and file.kind == "csv")
    rows = Rows(file, quoted, counts)
    with open_source(file) as stream:
        reading = rows.read(stream)
        header = next(reading, None)
        if header is None:
            return
        columns = _columns(file, header[1], names, quoted)
        width = len(header[1])
        batch: list[list[str]] = []
        size = 0
        for line, row in reading:
            if len(row) != width:
                raise other_width(file, line, row, width, quoted)
            batch.append([row[column] for column in columns])
            size += sum(map(len, batch[-1]))
            if size >= source_file.BATCH_BYTES or len(batch) >= source_file.BATCH_DOCUMENTS:
                yield rows.columns(batch)
                batch, size = [], 0
        if batch:
            yield rows.columns(batch)


@dataclass
class Rows:
    """The rows of a file, read as Latin-1, in which each byte is a character. Bytes that are not UTF-8 are
    reported later, when the documents are cleaned."""

    file: SourceFile
    quoted: bool
    counts: CleanCounts
    first_like_rows: str = ""
    """Location of the first value whose lines look like rows."""
    spaced: bool = False
    """Whether every delimiter of the first line is followed by a space, which then is not part of values."""
    bytes_of_row: int = 0
    """Bytes read so far of the lines of the current row."""

    def read(self, stream: Any) -> Iterator[tuple[int, list[str]]]:
        """Yield (number of the first line, values) of each row that is not a blank line."""
        delimiter = "\t" if self.file.kind == "tsv" else ","
        lines = self._lines_of_rows(stream, delimiter)
        first = next(lines, "")
        self.spaced = (
            self.quoted
            and f"{delimiter} " in first
            and first.count(delimiter) == first.count(f"{delimiter} ")
        )
        csv.field_size_limit(source_file.longest_parsed())
        rows = csv.reader(
            chain([first], lines) if first else lines,
            delimiter=delimiter,
            quoting=csv.QUOTE_MINIMAL if self.quoted else csv.QUOTE_NONE,
            skipinitialspace=self.spaced,
            strict=True,
        )
        line = 0
        while True:
            try:
                row = next(rows, None)
            except csv.Error as error:
                raise self._error(error, line + 1, rows.line_num, delimiter) from error
            if row is None:
                return
            self.bytes_of_row = 0
            if row:
                if rows.line_num > line + 1:
                    self._count_like_rows(row, line + 1, delimiter)
                yield line + 1, row
            line = rows.line_num

    def columns(self, rows: list[list[str]]) -> list[Texts]:
        columns: list[Texts] = []
        for texts in zip(*rows, strict=True):
            if not self.quoted:
                self.counts.quotes_kept += sum(
                    text[:1] == '"' and text[-1:] == '"' and len(text) > 1 for text in texts
                )
            columns.append([text.encode("latin-1") for text in texts])
        return columns

    def _lines_of_rows(self, stream: Any, delimiter: str) -> Iterator[str]:
        """Yield the lines of the file, checking the size of the rows that they form. Raise csv.Error for a
        row that is too long because of an open quote, DataError for a line of too many values."""
        for number, line in enumerate(self._lines(stream), 1):
            self.bytes_of_row += len(line)
            if self.bytes_of_row > source_file.longest_parsed():
                raise csv.Error(f"a row of more than {source_file.longest_parsed() >> 20} MiB")
            if len(line) > source_file.MOST_VALUES and line.count(delimiter) > source_file.MOST_VALUES:
                got = f"a row of more than {source_file.MOST_VALUES:,} values"
                raise DataError(Problem(f"{self.file.name} line {number}", got, "fewer"))
            yield line

    def _lines(self, stream: Any) -> Iterator[str]:
        text = io.TextIOWrapper(stream, encoding="latin-1", newline="")
        number = 0
        while line := text.readline(source_file.longest_parsed() + 1):
            number += 1
            if number == 1:
                line = line.removeprefix("\xef\xbb\xbf")
            if len(line) > source_file.longest_parsed():
                got = f"a line of more than {source_file.longest_parsed() >> 20} MiB"
                raise DataError(Problem(f"{self.file.name} line {number}", got, "shorter lines"))
            if "\0" in line:
                refuse_utf16(line.encode("latin-1"), f"{self.file.name} line {number}")
                # The csv module of some Python versions rejects them.
                self.counts.controls_removed += line.count("\0")
                line = line.replace("\0", "")
            yield line

    def _count_like_rows(self, row: list[str], line: int, delimiter: str) -> None:
        """Count the row if the lines of its value look like rows: two unclosed quotes, one far after the
        other, turn everything between them into one value."""
        text = delimiter.join(row)
        delimiters, lines = len(row) - 1, text.count("\n") + 1
        if lines * delimiters >= LIKE_ROWS and all(
            line.count(delimiter) == delimiters for line in _lines_of(text)
        ):
            first = self.first_like_rows = self.first_like_rows or f"{self.file.name} line {line}"
            self.counts.like_rows[first] = self.counts.like_rows.get(first, 0) + 1

    def _error(self, error: csv.Error, start: int, stop: int, delimiter: str) -> DataError:
        if not self.quoted:
            return DataError(Problem(f"{self.file.name} line {stop}", str(error), "rows of values"))
        opened = self._quote_opened(start, stop, delimiter)
        where = f"{self.file.name} line {opened}"
        if "unexpected end" in str(error):
            got = "an unclosed quote: the value extends to the end of the file"
        elif "expected after" in str(error):
            got = f"a quote that closes before other text, on line {stop}, not before a delimiter"
        else:
            got = f"a quote whose value extends to line {stop} ({error})"
        allowed = 'closed quotes, "" for a quote within a value'
        return DataError(Problem(where, got, allowed, "correct it, or give quoting=none if quotes are text"))

    def _quote_opened(self, start: int, stop: int, delimiter: str) -> int:
        """Return the line of the quote that was opened last in the row on lines `start` to `stop`."""
        opened, is_open = start, False
        with open_source(self.file) as stream:
            for number, line in enumerate(self._lines(stream), 1):
                column = 0
                while start <= number <= stop and column < len(line):
                    if not is_open and self.spaced and line[column] == " ":
                        column += 1
                    elif not is_open and line[column] != '"':
                        column = line.find(delimiter, column) + 1 or len(line)
                    elif not is_open:
                        opened, is_open, column = number, True, column + 1
                    elif (end := line.find('"', column)) >= 0:
                        is_open, column = line[end + 1 : end + 2] == '"', end + 2
                    else:
                        break
                if number == stop:
                    break
        return opened


def _columns(file: SourceFile, header: list[str], names: Sequence[str], quoted: bool) -> list[int]:
    """Return the indices of the named columns. If a name is not found, ignore white space around the names of
    the header."""
    where = f"{file.name} header"
    header = [source_file.decoded(name.encode("latin-1"), where) for name in header]
    if not set(names) <= set(header):
        bare = [name.strip() for name in header]
        header = bare if set(names) <= set(bare) else header
    if not set(names) <= set(header):
        if not quoted and any(name.startswith('"') for name in header):
            got = f"no field {', '.join(names)}"
            allowed = ", ".join(map(short_name, header[:24]))
            raise DataError(Problem(where, got, allowed, QUOTED))
        raise missing_field(where, names, header)
    for name in names:
        if header.count(name) > 1:
            raise DataError(
                Problem(where, f"field {name} {header.count(name)} times", "one column of that name")
            )
    return [header.index(name) for name in names]


def other_width(file: SourceFile, line: int, row: list[str], width: int, quoted: bool) -> DataError:
    """Return the error for a row with another number of values than the header's `width`."""
    where = f"{file.name} line {line}"
    got = f"{len(row)} values"
    remedy = "quote values that hold delimiters or line ends" if quoted else ""
    if not quoted and any(value.startswith('"') for value in row):
        remedy = QUOTED
    return DataError(Problem(where, got, f"{width}, as many as the header has", remedy))


def _lines_of(text: str) -> Iterator[str]:
    """Yield the lines of `text` one by one; a list of them could need twenty times the memory of the text."""
    start = 0
    while (end := text.find("\n", start)) >= 0:
        yield text[start:end]
        start = end + 1
    yield text[start:]
