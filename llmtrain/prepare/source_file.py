"""Source files, parts and batches of documents: the types, limits and line reading that all formats share."""

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
from llmtrain.prepare.decompress import open_source
from llmtrain.prepare.folder_scan import short_name

UNIT_BYTES = 16 << 20
"""Approximate bytes of a unit of work. Constant, because documents of txt_document=auto start anew at each
unit: this way the documents of a file depend only on the file."""
BATCH_BYTES = 1 << 20
"""Approximate bytes of a batch of documents."""
LONGEST_LINE = 128 << 20
"""Maximum bytes of a line, and of a document in a file without lines."""
PARSED_SHARE = 4
"""Parsed lines and rows may have LONGEST_LINE / PARSED_SHARE bytes: parsers need ten bytes per byte."""
MOST_VALUES = 4 << 20
"""Maximum number of values in an object or row: three bytes of a file may become a value of 70 bytes."""
BATCH_DOCUMENTS = 1 << 16
"""Maximum number of documents in a batch: empty documents need memory too."""
_LONE_RETURN = re.compile(rb"\r(?!\n)")


COLUMNS = ("csv", "tsv", "jsonl", "parquet")
"""Kinds of files whose texts are named fields."""


class Tokens(list[np.ndarray]):
    """A batch of documents as arrays of token ids, TOKEN_DTYPE, without eos."""


TOKEN_DTYPE = np.dtype("<u4")
Texts = Sequence[str] | Sequence[bytes]


class Pairs(NamedTuple):
    """A batch of pairs: sources[i] belongs to targets[i]."""

    sources: Texts
    targets: Texts


Batch = Texts | Tokens | Pairs


@dataclass(frozen=True)
class SourceFile:
    """A file of the sources, local or remote."""

    path: Path
    name: str
    """The name for messages, as the user would write it."""
    kind: str
    compression: str
    size: int
    mtime_ns: int
    url: str = ""
    """URL of a remote file; `path` is then its bare name."""
    version: str = ""
    """Version of a remote file; it changes when the file does."""
    target: SourceFile | None = None
    """The file whose lines are the targets of the lines of this file."""

    @property
    def files(self) -> tuple[SourceFile, ...]:
        """This file and, for pairs of lines, its file of targets."""
        return (self,) if self.target is None else (self, self.target)


@dataclass(frozen=True)
class Part:
    """A part of one file: bytes [start, stop) of an uncompressed .txt or .jsonl, row groups [start, stop) of
    a .parquet, or the whole file (stop is None)."""

    file: SourceFile
    start: int = 0
    stop: int | None = None

    @property
    def size(self) -> int:
        """Number of bytes; that of the whole file for a .parquet."""
        return self.file.size if self.stop is None or self.file.kind == "parquet" else self.stop - self.start


Unit = tuple[Part, ...]


class _LineEnds(io.RawIOBase):
    """A stream in which every lone carriage return, the line end of old systems, is replaced by a newline.
    The offsets of all bytes stay the same."""

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
    """Open a file of lines; lone carriage returns read as newlines."""
    return io.BufferedReader(_LineEnds(open_source(file)), BATCH_BYTES)


def line_chunks(part: Part, lone_returns: bool = True) -> Iterator[tuple[int, bytes]]:
    """Yield (byte offset, whole lines of about BATCH_BYTES) of a part.

    lone_returns: whether lone carriage returns end lines too.
    A part begins at the first line that starts at or after its start, and ends where the next part begins, so
    every line is in exactly one part.
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
            refuse_utf16(data, part.file.name)
            yield offset, data
            offset += len(data)


def longest_parsed() -> int:
    """Return the maximum bytes of a line of JSON or a row of a table."""
    return LONGEST_LINE // PARSED_SHARE


def refuse_utf16(data: bytes, where: str) -> None:
    """Raise DataError for text in UTF-16 or UTF-32 without a byte order mark. Most of it is valid UTF-8 of
    another meaning; it is recognized by zero bytes at offsets that are equal modulo 2 or 4."""
    if b"\0" not in data:
        return
    # A mask takes one byte per byte, offsets would take eight, and a line may be long.
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
        got = f"text that seems to be UTF-{32 if utf_32 else 16}: {zeros:,} zero bytes at even distances"
        raise DataError(Problem(where, got, "UTF-8", "convert it, for example with iconv"))


def decoded(data: bytes, where: str) -> str:
    """Decode a whole document. Raise DataError if it is not UTF-8."""
    try:
        return data.decode()
    except UnicodeDecodeError as error:
        got = f"bytes that are not UTF-8: 0x{data[error.start]:02x} at byte {error.start}"
        raise DataError(Problem(where, got, "UTF-8", "convert it, for example with iconv")) from error


def _read_line(stream: IO[bytes], file: SourceFile) -> bytes:
    """Read one line. Raise DataError for a line over LONGEST_LINE before joining its pieces, which doubles
    the memory."""
    pieces, size = [], 0
    while True:
        pieces.append(stream.readline(BATCH_BYTES))
        size += len(pieces[-1])
        if size > LONGEST_LINE:
            got = f"a line of more than {LONGEST_LINE >> 20} MiB"
            raise DataError(Problem(file.name, got, "shorter lines", "split it into lines"))
        if not pieces[-1] or pieces[-1].endswith(b"\n"):
            return b"".join(pieces)


def missing_field(where: str, wanted: Sequence[str], fields: Sequence[str]) -> DataError:
    """Return the error for a missing field.

    wanted: names of the text field and, for pairs, the target field, one of which is not in `fields`.
    """
    missing = next(number for number, name in enumerate(wanted) if name not in fields)
    remedy = f"set {('text_field', 'target_field')[missing]}=…"
    allowed = ", ".join(map(short_name, fields[:24])) or "(no fields)"
    return DataError(Problem(where, f"no field {wanted[missing]}", allowed, remedy))
