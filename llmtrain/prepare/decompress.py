"""Open source files, decompressing .gz and .zst, with limits on size and memory; turn read errors into
DataError."""

from __future__ import annotations

import gzip
import io
import os
import zlib
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import IO, TYPE_CHECKING, Any

import psutil

from llmtrain.errors import DataError, Problem
from llmtrain.reading import open_regular

if TYPE_CHECKING:
    from llmtrain.prepare.source_file import SourceFile

BUFFER_BYTES = 1 << 20
LONGEST_WINDOW = 1 << 31
"""Maximum window of a .zst in bytes, all of which are held in memory; the limit of zstd."""
COMMON_WINDOW = 128 << 20
"""Largest window in bytes that zstd decompresses by default."""
UNPACKED_TIMES = 256
"""Highest accepted compression ratio. Text compresses about 10-fold, repetitive logs 100-fold, decompression
bombs 1,000-fold or more."""
UNPACKED_BYTES = 256 << 20
"""Uncompressed size in bytes that is accepted for a file of any size."""
GZIP_MAGIC = b"\x1f\x8b"
_FRAME_HEADER_BYTES = 18
_ZSTD_INPUT_BYTES = 2048
"""Bytes given to zstd at a time. Four bytes may expand to 128 KiB, so the output is at most 64 MiB; larger
pieces are not faster."""


class BadZstdError(Exception):
    pass


def open_source(file: SourceFile) -> IO[bytes]:
    """Return a stream of the uncompressed bytes. Opening and reading raise DataError that names the file."""
    return io.BufferedReader(_SourceBytes(file), BUFFER_BYTES)


class Allowance:
    """The number of bytes that a compressed file may still expand to."""

    def __init__(self, where: str, size: int, what: str = "bytes of unpacked data") -> None:
        """where: name of the file; size: its compressed size in bytes; what: the unit in the error
        message."""
        self._where, self._size, self._what = where, size, what
        self._most = self._left = max(UNPACKED_BYTES, UNPACKED_TIMES * size)

    def take(self, count: int) -> None:
        """Subtract `count` bytes. Raise DataError if the allowance is exceeded."""
        self._left -= count
        if self._left < 0:
            got = f"more than {self._most:,} {self._what} from a file of {self._size:,} bytes"
            allowed = f"{UNPACKED_TIMES} for each byte of the file, or {UNPACKED_BYTES >> 20} MiB"
            remedy = "if the contents are intended, decompress the file and give the result as source"
            raise DataError(Problem(self._where, got, allowed, remedy))


@contextmanager
def read_errors(file: SourceFile) -> Iterator[None]:
    """Turn errors of reading a source file into a DataError that names it."""
    try:
        yield
    except (EOFError, zlib.error, gzip.BadGzipFile, BadZstdError) as error:
        got = f"damaged .{file.compression} data ({error})"
        raise DataError(Problem(file.name, got, "", "copy or download it again")) from error
    except MemoryError as error:
        raise out_of_memory(file) from error
    except OSError as error:
        raise DataError(Problem(file.name, error.strerror or str(error), "a readable file")) from error


def out_of_memory(file: SourceFile) -> DataError:
    return DataError(Problem(file.name, "more than the free memory", "", "lower workers"))


def refuse_changed(file: SourceFile) -> None:
    """Raise DataError if the size or modification time of a file has changed since it was found."""
    with read_errors(file):
        status = os.stat(file.path)
    if (status.st_size, status.st_mtime_ns) != (file.size, file.mtime_ns):
        got = "another state of the file than when this run began"
        if status.st_size != file.size:
            got += f" ({status.st_size:,} bytes, and {file.size:,} then)"
        remedy = "run the same command again once nothing writes to the file"
        raise DataError(Problem(file.name, got, remedy=remedy))


def refuse_long_windows(files: Sequence[SourceFile], workers: int) -> list[str]:
    """Return notes on .zst files that need much memory while they are read.

    Raise DataError if the workers together would need more than the free memory.
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


def unpacked(packed: IO[bytes], compression: str, where: str, size: int) -> Any:
    """Return a raw stream of the decompressed data, or `packed` itself if `compression` is empty.

    Closing it closes `packed`. Reading raises EOFError, OSError, zlib.error or BadZstdError for damaged data,
    and DataError that names `where` if the data exceed the allowance of a file of `size` bytes.
    """
    if not compression:
        return packed
    stream = _GzipStream(packed) if compression == "gz" else _ZstdStream(packed)
    return _Unpacked(stream, Allowance(where, size))


class _SourceBytes(io.RawIOBase):
    """The raw stream behind `open_source`."""

    def __init__(self, file: SourceFile) -> None:
        self._file = file
        with read_errors(file):
            packed = open(file.path, "rb", -1 if file.compression else 0, opener=open_regular)  # noqa: SIM115
            self._stream: Any = unpacked(packed, file.compression, file.name, file.size)

    def readable(self) -> bool:
        return True

    def seekable(self) -> bool:
        return not self._file.compression

    def seek(self, offset: int, whence: int = os.SEEK_SET) -> int:
        return self._stream.seek(offset, whence)

    def readinto(self, buffer: Any) -> int:
        with read_errors(self._file):
            return self._stream.readinto(buffer)

    def close(self) -> None:
        if hasattr(self, "_stream"):
            self._stream.close()
        super().close()


class _Unpacked(io.RawIOBase):
    def __init__(self, stream: Any, allowance: Allowance) -> None:
        self._stream, self._allowance = stream, allowance

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: Any) -> int:
        count = self._stream.readinto(buffer)
        self._allowance.take(count)
        return count

    def close(self) -> None:
        self._stream.close()
        super().close()


class _GzipStream(gzip.GzipFile):
    """A GzipFile that also closes the stream it reads from."""

    def __init__(self, packed: IO[bytes]) -> None:
        super().__init__(fileobj=packed, mode="rb")
        self._packed = packed

    def close(self) -> None:
        super().close()
        self._packed.close()


class _ZstdStream(io.RawIOBase):
    """Decompresses a .zst of any number of frames. Unlike the reader of zstandard, it raises BadZstdError if
    the file ends inside a frame."""

    def __init__(self, packed: IO[bytes]) -> None:
        import zstandard

        self._zstandard = zstandard
        self._file = packed
        self._decompressor: Any = None
        self._frame: Any = None
        self._output = memoryview(b"")

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: Any) -> int:
        while not self._output:
            data = self._frame.unused_data if self._frame is not None and self._frame.eof else b""
            if self._frame is None or self._frame.eof:
                data = data or self._file.read(_ZSTD_INPUT_BYTES)
                if not data:
                    return 0
                if self._decompressor is None:
                    # The window of the first frame was checked against the free memory; it bounds later
                    # frames.
                    window = max(_window_of(data), COMMON_WINDOW)
                    if window > COMMON_WINDOW and window > psutil.virtual_memory().available:
                        raise MemoryError
                    self._decompressor = self._zstandard.ZstdDecompressor(max_window_size=window)
                self._frame = self._decompressor.decompressobj()
            else:
                data = self._file.read(_ZSTD_INPUT_BYTES)
                if not data:
                    raise BadZstdError("the file ends inside a frame")
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


def _window_bytes(file: SourceFile) -> int:
    with read_errors(file), open(file.path, "rb", opener=open_regular) as stream:
        return _window_of(stream.read(_FRAME_HEADER_BYTES))


def _window_of(header: bytes) -> int:
    """Return the window in bytes, at most LONGEST_WINDOW, of the .zst frame with this header; 0 if it is not
    a frame, which reading reports."""
    import zstandard

    try:
        return min(int(zstandard.get_frame_parameters(header).window_size), LONGEST_WINDOW)
    except zstandard.ZstdError:
        return 0
