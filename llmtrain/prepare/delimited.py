"""Documents of .csv and .tsv files: every row has as many values as the header, or is refused by its line."""

from __future__ import annotations

import csv
import io
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import chain
from typing import Any

from llmtrain.errors import DataError, Problem
from llmtrain.prepare import streams
from llmtrain.prepare.clean import CleanCounts
from llmtrain.prepare.opening import open_source
from llmtrain.prepare.scan import brief
from llmtrain.prepare.streams import SourceFile, Texts, missing_field, refuse_wide

LIKE_ROWS = 4
"""So many delimiters must stand in the lines of one value as in rows to call the lines rows."""


def read_delimited(
    file: SourceFile, names: Sequence[str], quoting: str, counts: CleanCounts
) -> Iterator[list[Texts]]:
    """The columns of these names, a batch of rows at a time. quoting: PrepareConfig's. Adds to `counts` what
    may be meant otherwise."""
    quoted = quoting == "double" or (quoting == "auto" and file.kind == "csv")
    rows = _Rows(file, quoted, counts)
    with open_source(file) as stream:
        reading = rows.read(stream)
        header = next(reading, None)
        if header is None:
            return
        places = _places(file, header[1], names, quoted)
        width = len(header[1])
        batch: list[list[str]] = []
        size = 0
        for line, row in reading:
            if len(row) != width:
                raise _other_width(file, line, row, width, quoted)
            batch.append([row[place] for place in places])
            size += sum(map(len, batch[-1]))
            if size >= streams.BATCH_BYTES or len(batch) >= streams.BATCH_DOCUMENTS:
                yield rows.columns(batch)
                batch, size = [], 0
        if batch:
            yield rows.columns(batch)


@dataclass
class _Rows:
    """The rows of a file. They are read as Latin-1, in which each byte is a character: what is no UTF-8 is
    told where documents are cleaned."""

    file: SourceFile
    quoted: bool
    counts: CleanCounts
    first_like_rows: str = ""
    """Where in the file the first value stands whose lines look like rows."""
    spaced: bool = False
    """A space behind each delimiter is the file's style, as its first line shows."""
    bytes_of_row: int = 0
    """In the lines that were read for the row that is not whole yet."""

    def read(self, stream: Any) -> Iterator[tuple[int, list[str]]]:
        """(its first line's number, values) of each row that is no blank line."""
        delimiter = "\t" if self.file.kind == "tsv" else ","
        lines = self._lines_of_rows(stream, delimiter)
        first = next(lines, "")
        self.spaced = (
            self.quoted
            and f"{delimiter} " in first
            and first.count(delimiter) == first.count(f"{delimiter} ")
        )
        csv.field_size_limit(streams.longest_parsed())
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
        """The lines, while the row that they make is one that memory holds. Raises csv.Error for one of too
        many lines, which quotes alone can make."""
        for number, line in enumerate(self._lines(stream), 1):
            self.bytes_of_row += len(line)
            if self.bytes_of_row > streams.longest_parsed():
                raise csv.Error(f"a row of more than {streams.longest_parsed() >> 20} MiB")
            if len(line) > streams.MOST_VALUES and line.count(delimiter) > streams.MOST_VALUES:
                got = f"a row of more than {streams.MOST_VALUES:,} values"
                raise DataError(Problem(f"{self.file.name} line {number}", got, "fewer"))
            yield line

    def _lines(self, stream: Any) -> Iterator[str]:
        text = io.TextIOWrapper(stream, encoding="latin-1", newline="")
        number = 0
        while line := text.readline(streams.longest_parsed() + 1):
            number += 1
            if number == 1:
                line = line.removeprefix("\xef\xbb\xbf")
            if len(line) > streams.longest_parsed():
                got = f"a line of more than {streams.longest_parsed() >> 20} MiB"
                raise DataError(Problem(f"{self.file.name} line {number}", got, "shorter lines"))
            if "\0" in line:
                refuse_wide(line.encode("latin-1"), f"{self.file.name} line {number}")
                # Not every Python's csv takes them.
                self.counts.controls_removed += line.count("\0")
                line = line.replace("\0", "")
            yield line

    def _count_like_rows(self, row: list[str], line: int, delimiter: str) -> None:
        """Two quotes that are not closed, one far behind the other, make a row of all between them."""
        text = delimiter.join(row)
        delimiters, lines = len(row) - 1, text.count("\n") + 1
        if lines * delimiters >= LIKE_ROWS and all(
            line.count(delimiter) == delimiters for line in _lines_of(text)
        ):
            place = self.first_like_rows = self.first_like_rows or f"{self.file.name} line {line}"
            self.counts.like_rows[place] = self.counts.like_rows.get(place, 0) + 1

    def _error(self, error: csv.Error, start: int, stop: int, delimiter: str) -> DataError:
        if not self.quoted:
            return DataError(Problem(f"{self.file.name} line {stop}", str(error), "rows of values"))
        opened = self._quote_opened(start, stop, delimiter)
        where = f"{self.file.name} line {opened}"
        if "unexpected end" in str(error):
            got = "a quote that is not closed: it takes all up to the end of the file"
        elif "expected after" in str(error):
            got = f"a quote that ends before other text, on line {stop}, not before a delimiter"
        else:
            got = f"a quote that takes all up to line {stop} ({error})"
        allowed = 'closed quotes, "" for one within a value'
        return DataError(Problem(where, got, allowed, "mend it, or give quoting=none if quotes are text"))

    def _quote_opened(self, start: int, stop: int, delimiter: str) -> int:
        """The line of the quote that was open last, in a row on lines `start` to `stop`."""
        opened, is_open = start, False
        with open_source(self.file) as stream:
            for number, line in enumerate(self._lines(stream), 1):
                place = 0
                while start <= number <= stop and place < len(line):
                    if not is_open and self.spaced and line[place] == " ":
                        place += 1
                    elif not is_open and line[place] != '"':
                        place = line.find(delimiter, place) + 1 or len(line)
                    elif not is_open:
                        opened, is_open, place = number, True, place + 1
                    elif (end := line.find('"', place)) >= 0:
                        is_open, place = line[end + 1 : end + 2] == '"', end + 2
                    else:
                        break
                if number == stop:
                    break
        return opened


def _places(file: SourceFile, header: list[str], names: Sequence[str], quoted: bool) -> list[int]:
    """The columns of these names; white space around the header's does not count where no name has it."""
    where = f"{file.name} header"
    header = [streams.decoded(name.encode("latin-1"), where) for name in header]
    if not set(names) <= set(header):
        bare = [name.strip() for name in header]
        header = bare if set(names) <= set(bare) else header
    if not set(names) <= set(header):
        if not quoted and any(name.startswith('"') for name in header):
            got = f"no field {', '.join(names)}"
            raise DataError(
                Problem(
                    where, got, ", ".join(map(brief, header[:24])), "quoting=double if values stand in quotes"
                )
            )
        raise missing_field(where, names, header)
    for name in names:
        if header.count(name) > 1:
            raise DataError(
                Problem(where, f"field {name} {header.count(name)} times", "one column of that name")
            )
    return [header.index(name) for name in names]


def _other_width(file: SourceFile, line: int, row: list[str], width: int, quoted: bool) -> DataError:
    where = f"{file.name} line {line}"
    got = f"{len(row)} values"
    remedy = "quote values that hold delimiters or line ends" if quoted else ""
    if not quoted and any(value.startswith('"') for value in row):
        remedy = "quoting=double if values stand in quotes"
    return DataError(Problem(where, got, f"{width}, as many as the header has", remedy))


def _lines_of(text: str) -> Iterator[str]:
    """One after the other: all at once would take twenty times the memory of the text."""
    start = 0
    while (end := text.find("\n", start)) >= 0:
        yield text[start:end]
        start = end + 1
    yield text[start:]
