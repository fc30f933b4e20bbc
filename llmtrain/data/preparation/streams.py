"""What the readers of all formats share: a source file's description, its bytes, its lines."""

from __future__ import annotations

import codecs
import gzip
import io
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any, NamedTuple

import numpy as np

from llmtrain.errors import DataError, Problem

# Fixed, because .txt documents of `auto` are packed anew at each border: a file's documents then
# depend on nothing but the file.
UNIT_BYTES = 16 << 20
BATCH_BYTES = 1 << 20
LONGEST_LINE = 256 << 20


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


def open_source(file: SourceFile) -> IO[bytes]:
    if file.compression == "gz":
        return io.BufferedReader(gzip.open(file.path, "rb"), BATCH_BYTES)  # type: ignore[arg-type]
    if file.compression == "zst":
        return io.BufferedReader(_ZstdStream(file.path), BATCH_BYTES)
    return open(file.path, "rb")


class BadZstdError(Exception):
    pass


class _ZstdStream(io.RawIOBase):
    """Decompressed bytes of a .zst, of any number of frames; unlike zstandard's own reader it raises
    when the file ends inside a frame."""

    def __init__(self, path: Path) -> None:
        import zstandard

        self._zstandard = zstandard
        self._file = open(path, "rb")  # noqa: SIM115
        self._frame: Any = None
        self._output = memoryview(b"")

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: Any) -> int:
        while not self._output:
            data = self._frame.unused_data if self._frame is not None and self._frame.eof else b""
            if self._frame is None or self._frame.eof:
                data = data or self._file.read(1 << 14)
                if not data:
                    return 0
                self._frame = self._zstandard.ZstdDecompressor().decompressobj()
            else:
                data = self._file.read(1 << 14)
                if not data:
                    raise BadZstdError("it ends inside a frame")
            try:
                self._output = memoryview(self._frame.decompress(data))
            except self._zstandard.ZstdError as error:
                raise BadZstdError(str(error)) from error
        count = min(len(buffer), len(self._output))
        buffer[:count] = self._output[:count]
        self._output = self._output[count:]
        return count

    def close(self) -> None:
        self._file.close()
        super().close()


def line_chunks(part: Part) -> Iterator[tuple[int, bytes]]:
    """(byte offset, whole lines of about BATCH_BYTES) of a part.

    A part begins at the first line that starts at or behind its start, and ends where the next part
    begins, so parts neither share nor miss a line.
    """
    with open_source(part.file) as stream:
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
            yield offset, data
            offset += len(data)


def _read_line(stream: IO[bytes], file: SourceFile) -> bytes:
    line = stream.readline(LONGEST_LINE + 1)
    if len(line) > LONGEST_LINE:
        raise DataError(
            Problem(
                file.name,
                f"a line of more than {LONGEST_LINE >> 20} MiB",
                "shorter lines",
                "cut it into lines",
            )
        )
    return line


def missing_field(where: str, wanted: Sequence[str], fields: Sequence[str]) -> DataError:
    """wanted: names of the texts' fields, or of the sources' and the targets'; one is not among `fields`."""
    missing = next(number for number, name in enumerate(wanted) if name not in fields)
    remedy = f"set {('text_field', 'target_field')[missing]}=…"
    allowed = ", ".join(fields[:24]) or "(no fields)"
    return DataError(Problem(where, f"no field {wanted[missing]}", allowed, remedy))
