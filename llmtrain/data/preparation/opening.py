"""The bytes of a source file, uncompressed; and, in one place, why they cannot be had."""

from __future__ import annotations

import gzip
import io
import os
import zlib
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import IO, TYPE_CHECKING, Any

import psutil

from llmtrain.errors import DataError, Problem

if TYPE_CHECKING:
    from llmtrain.data.preparation.streams import SourceFile

BUFFER_BYTES = 1 << 20
LONGEST_WINDOW = 1 << 31
"""Bytes of earlier text that a .zst may refer to, which are held while it is read; zstd's own limit."""
COMMON_WINDOW = 128 << 20
"""What zstd reads without being told."""
_FRAME_HEADER_BYTES = 18


class BadZstdError(Exception):
    pass


def open_source(file: SourceFile) -> IO[bytes]:
    """Its bytes; opening and reading raise DataError that names the file for whatever goes wrong."""
    return io.BufferedReader(_SourceBytes(file), BUFFER_BYTES)


@contextmanager
def reading(file: SourceFile) -> Iterator[None]:
    """Turn what goes wrong while a source's bytes are read into a DataError that names it."""
    try:
        yield
    except (EOFError, zlib.error, gzip.BadGzipFile, BadZstdError) as error:
        got = f"damaged .{file.compression} data ({error})"
        raise DataError(Problem(file.name, got, "", "copy or download it again")) from error
    except MemoryError as error:
        raise DataError(
            Problem(file.name, "more than the memory that is left", "", "lower workers")
        ) from error
    except OSError as error:
        raise DataError(
            Problem(file.name, error.strerror or str(error), "a file that can be read")
        ) from error


def refuse_changed(file: SourceFile) -> None:
    """Raise DataError if a file is no longer the one that was found."""
    with reading(file):
        status = os.stat(file.path)
    if (status.st_size, status.st_mtime_ns) != (file.size, file.mtime_ns):
        got = "another state of the file than when this run began"
        if status.st_size != file.size:
            got += f" ({status.st_size:,} bytes, and {file.size:,} then)"
        remedy = "run the same command again when nothing writes to it any more"
        raise DataError(Problem(file.name, got, remedy=remedy))


def refuse_long_windows(files: Sequence[SourceFile], workers: int) -> list[str]:
    """Notes on .zst files that take much memory while they are read.

    Raises DataError where the workers together would take more than is free.
    """
    windows = {file.name: _window_bytes(file) for file in files if file.compression == "zst" and not file.url}
    long = sorted((size, name) for name, size in windows.items() if size > COMMON_WINDOW)
    if not long:
        return []
    needed, available = sum(size for size, _ in long[-workers:]), psutil.virtual_memory().available
    largest, name = long[-1]
    what = f"{len(long):,} .zst with long windows ({name}: {largest / 2**20:,.0f} MiB)"
    if needed > available:
        together = min(len(long), workers)
        got = f"{workers}, of which {together} hold {needed / 2**20:,.0f} MiB at once for {what}"
        remedy = f"lower workers to {available // largest}" if available >= largest else "free memory"
        raise DataError(Problem("workers", got, f"{available / 2**20:,.0f} MiB, which are free", remedy))
    return [f"{what}: a worker holds as much memory while it reads one"]


class _SourceBytes(io.RawIOBase):
    """The raw stream under `open_source`."""

    def __init__(self, file: SourceFile) -> None:
        self._file = file
        with reading(file):
            self._stream: Any = _OPEN[file.compression](file.path)

    def readable(self) -> bool:
        return True

    def seekable(self) -> bool:
        return not self._file.compression

    def seek(self, offset: int, whence: int = os.SEEK_SET) -> int:
        return self._stream.seek(offset, whence)

    def readinto(self, buffer: Any) -> int:
        with reading(self._file):
            return self._stream.readinto(buffer)

    def close(self) -> None:
        if hasattr(self, "_stream"):
            self._stream.close()
        super().close()


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
                decompressor = self._zstandard.ZstdDecompressor(max_window_size=LONGEST_WINDOW)
                self._frame = decompressor.decompressobj()
            else:
                data = self._file.read(1 << 14)
                if not data:
                    raise BadZstdError("it ends inside a frame")
            try:
                self._output = memoryview(self._frame.decompress(data))
            except self._zstandard.ZstdError as error:
                if "not enough memory" in str(error):
                    raise MemoryError from error
                raise BadZstdError(str(error)) from error
        count = min(len(buffer), len(self._output))
        buffer[:count] = self._output[:count]
        self._output = self._output[count:]
        return count

    def close(self) -> None:
        self._file.close()
        super().close()


_OPEN: dict[str, Any] = {
    "": io.FileIO,
    "gz": gzip.GzipFile,
    "zst": _ZstdStream,
}


def _window_bytes(file: SourceFile) -> int:
    """The window of the first frame of a .zst; 0 for what is no frame, which its reader tells."""
    import zstandard

    with reading(file), open(file.path, "rb") as stream:
        header = stream.read(_FRAME_HEADER_BYTES)
    try:
        return int(zstandard.get_frame_parameters(header).window_size)
    except zstandard.ZstdError:
        return 0
