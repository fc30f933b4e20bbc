"""What the readers of all formats share: a source file's description, its bytes, its lines."""

from __future__ import annotations

import codecs
import io
import os
import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any, NamedTuple

import numpy as np

from llmtrain.errors import DataError, Problem
from llmtrain.prepare.opening import open_source
from llmtrain.prepare.scan import brief

# Fixed, because .txt documents of `auto` are packed anew at each border: a file's documents then
# depend on nothing but the file.
UNIT_BYTES = 16 << 20
BATCH_BYTES = 1 << 20
LONGEST_LINE = 128 << 20
"""Bytes of a line, and of a document that a file of another kind holds."""
PARSED_SHARE = 4
"""A line or a row that is parsed may have this part of LONGEST_LINE: libraries take ten bytes for each."""
MOST_VALUES = 4 << 20
"""In an object or a row: three bytes of a file may make a value that takes 70 in memory."""
BATCH_DOCUMENTS = 1 << 16
"""In a batch at most: an empty document takes memory too."""
_LONE_RETURN = re.compile(rb"\r(?!\n)")


COLUMNS = ("csv", "tsv", "jsonl", "parquet")
"""Kinds of files whose texts are fields."""


class Tokens(list[np.ndarray]):
    """A batch of documents as token ids, TOKEN_DTYPE, without eos."""


TOKEN_DTYPE = np.dtype("<u4")
Texts = Sequence[str] | Sequence[bytes]


class Pairs(NamedTuple):
    """A batch of pairs."""

    sources: Texts
    targets: Texts
    """As many."""


Batch = Texts | Tokens | Pairs


@dataclass(frozen=True)
class SourceFile:
    path: Path
    name: str
    """As the user would spell it; stands in messages."""
    kind: str
    compression: str
    size: int
    mtime_ns: int
    url: str = ""
    """Where the file is, if not on this machine; then `path` is its bare name."""
    version: str = ""
    """What tells the state of a file elsewhere from a later one."""
    target: SourceFile | None = None
    """The file whose lines are the targets of this one's lines."""

    @property
    def files(self) -> tuple[SourceFile, ...]:
        """This, and the one of its targets."""
        return (self,) if self.target is None else (self, self.target)


@dataclass(frozen=True)
class Part:
    """A share of one file: bytes [start, stop) of a plain .txt or .jsonl, row groups of a .parquet,
    or the whole file (stop is None)."""

    file: SourceFile
    start: int = 0
    stop: int | None = None

    @property
    def size(self) -> int:
        """Bytes of the file, roughly where it is a .parquet."""
        return self.file.size if self.stop is None or self.file.kind == "parquet" else self.stop - self.start


Unit = tuple[Part, ...]


class _LineEnds(io.RawIOBase):
    """A stream in which each carriage return that stands alone, as old line ends do, is a newline; no byte
    changes its place."""

    def __init__(self, stream: IO[bytes]) -> None:
        self._stream: Any = stream

    def readable(self) -> bool:
        return True

    def seekable(self) -> bool:
        return self._stream.seekable()

    def seek(self, offset: int, whence: int = os.SEEK_SET) -> int:
        return self._stream.seek(offset, whence)

    def readinto(self, buffer: Any) -> int:
        data = self._stream.read1(len(buffer))
        if b"\r" in data:
            following = self._stream.peek(1)[:1] if data.endswith(b"\r") else b""
            data = _LONE_RETURN.sub(b"\n", data + following)[: len(data)]
        buffer[: len(data)] = data
        return len(data)

    def close(self) -> None:
        self._stream.close()
        super().close()


def open_lines(file: SourceFile) -> IO[bytes]:
    """The bytes of a file of lines, each of which ends with a newline."""
    return io.BufferedReader(_LineEnds(open_source(file)), BATCH_BYTES)


def line_chunks(part: Part, lone_returns: bool = True) -> Iterator[tuple[int, bytes]]:
    """(byte offset, whole lines of about BATCH_BYTES) of a part; lone carriage returns end lines too, if so
    wanted.

    A part begins at the first line that starts at or behind its start, and ends where the next part
    begins, so parts neither share nor miss a line.
    """
    with open_lines(part.file) if lone_returns else open_source(part.file) as stream:
        offset = 0
        if part.start:
            offset = part.start - 1
            stream.seek(offset)
            offset += len(_read_line(stream, part.file))
        elif stream.peek(3)[:3] == codecs.BOM_UTF8:  # type: ignore[attr-defined]
            stream.read(3)
            offset = 3
        while part.stop is None or offset < part.stop:
            size = BATCH_BYTES if part.stop is None else min(BATCH_BYTES, part.stop - offset)
            data = stream.read(size)
            if not data:
                return
            if not data.endswith(b"\n"):
                data += _read_line(stream, part.file)
            refuse_wide(data, part.file.name)
            yield offset, data
            offset += len(data)


def longest_parsed() -> int:
    """Return how many bytes a line of JSON, or a row of a table, may have."""
    return LONGEST_LINE // PARSED_SHARE


def refuse_wide(data: bytes, where: str) -> None:
    """Raise DataError for text in UTF-16 or UTF-32 without a mark: most of it may pass as UTF-8, and means
    something else. Its spaces and line ends have zero bytes, at places of one remainder by 2 or 4."""
    if b"\0" not in data:
        return
    # A byte for each byte: their places would take eight, and a line may be long.
    is_zero = np.frombuffer(data, np.uint8) == 0
    region = len(data) - int(np.argmax(is_zero)) - int(np.argmax(is_zero[::-1]))
    counts = np.array([np.count_nonzero(is_zero[start::4]) for start in range(4)])
    zeros = int(counts.sum())
    low, second, _, high = np.sort(counts)
    few = 3 if 8 * zeros >= region else 8
    by_two = max(counts[::2].sum(), counts[1::2].sum()) >= 0.95 * zeros
    utf_16 = by_two and zeros >= few and 25 * zeros >= region
    utf_32 = low <= 0.05 * high and second >= 0.5 * high and zeros >= 6 and 2 * zeros >= region
    if utf_16 or utf_32:
        got = f"text in UTF-{32 if utf_32 else 16}, it seems: {zeros:,} zero bytes at even distances"
        raise DataError(Problem(where, got, "UTF-8", "convert it, with iconv say"))


def decoded(data: bytes, where: str) -> str:
    """Text of a whole document. Raise DataError for what is no UTF-8."""
    try:
        return data.decode()
    except UnicodeDecodeError as error:
        got = f"bytes that are no UTF-8: 0x{data[error.start]:02x} at byte {error.start}"
        raise DataError(Problem(where, got, "UTF-8", "convert it, with iconv say")) from error


def _read_line(stream: IO[bytes], file: SourceFile) -> bytes:
    """Raise DataError for a longer line than may be, before its pieces are put together, which takes as much
    again."""
    pieces, size = [], 0
    while True:
        pieces.append(stream.readline(BATCH_BYTES))
        size += len(pieces[-1])
        if size > LONGEST_LINE:
            got = f"a line of more than {LONGEST_LINE >> 20} MiB"
            raise DataError(Problem(file.name, got, "shorter lines", "cut it into lines"))
        if not pieces[-1] or pieces[-1].endswith(b"\n"):
            return b"".join(pieces)


def missing_field(where: str, wanted: Sequence[str], fields: Sequence[str]) -> DataError:
    """wanted: names of the texts' fields, or of the sources' and the targets'; one is not among `fields`."""
    missing = next(number for number, name in enumerate(wanted) if name not in fields)
    remedy = f"set {('text_field', 'target_field')[missing]}=…"
    allowed = ", ".join(map(brief, fields[:24])) or "(no fields)"
    return DataError(Problem(where, f"no field {wanted[missing]}", allowed, remedy))
