"""The bytes of a source file, uncompressed; and, in one place, why they cannot be had."""

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
    from llmtrain.prepare.streams import SourceFile

BUFFER_BYTES = 1 << 20
LONGEST_WINDOW = 1 << 31
"""Bytes of earlier text that a .zst may refer to, which are held while it is read; zstd's own limit."""
COMMON_WINDOW = 128 << 20
"""What zstd reads without being told."""
UNPACKED_TIMES = 256
"""Most bytes that a byte of a compressed file may stand for: text packs to a tenth, logs that repeat
themselves to a hundredth; a file that is made to fill disks, to a thousandth and less."""
UNPACKED_BYTES = 256 << 20
"""So much may stand in any compressed file, however small: it fits on every disk."""
GZIP_MAGIC = b"\x1f\x8b"
_FRAME_HEADER_BYTES = 18
_ZSTD_INPUT_BYTES = 2048
"""Given to zstd at a time. Four bytes may stand for 128 KiB, so what comes back is 64 MiB at most; larger
pieces are not faster."""


class BadZstdError(Exception):
    pass


def open_source(file: SourceFile) -> IO[bytes]:
    """Its bytes; opening and reading raise DataError that names the file for whatever goes wrong."""
    return io.BufferedReader(_SourceBytes(file), BUFFER_BYTES)


class Allowance:
    """How many bytes a packed file of `size` bytes may still give; `what` follows their number in the
    message, and `where` names the file."""

    def __init__(self, where: str, size: int, what: str = "bytes of unpacked data") -> None:
        self._where, self._size, self._what = where, size, what
        self._most = self._left = max(UNPACKED_BYTES, UNPACKED_TIMES * size)

    def take(self, count: int) -> None:
        """Raise DataError if the file has given more than it may."""
        self._left -= count
        if self._left < 0:
            got = f"more than {self._most:,} {self._what} from a file of {self._size:,} bytes"
            allowed = f"{UNPACKED_TIMES} for each byte of the file, or {UNPACKED_BYTES >> 20} MiB"
            remedy = "unpack it into files of plain text, if that is what it should hold"
            raise DataError(Problem(self._where, got, allowed, remedy))


@contextmanager
def reading(file: SourceFile) -> Iterator[None]:
    """Turn what goes wrong while a source's bytes are read into a DataError that names it."""
    try:
        yield
    except (EOFError, zlib.error, gzip.BadGzipFile, BadZstdError) as error:
        got = f"damaged .{file.compression} data ({error})"
        raise DataError(Problem(file.name, got, "", "copy or download it again")) from error
    except MemoryError as error:
        raise out_of_memory(file) from error
    except OSError as error:
        raise DataError(
            Problem(file.name, error.strerror or str(error), "a file that can be read")
        ) from error


def out_of_memory(file: SourceFile) -> DataError:
    return DataError(Problem(file.name, "more than the memory that is left", "", "lower workers"))


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

    Raise DataError if the workers together would take more than is free.
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
    """The raw stream of what is packed in another, which it closes with itself; `packed` where nothing is.

    It raises EOFError, OSError, zlib.error and BadZstdError for damaged data, and DataError, with `where`,
    once it gives more than a file of `size` bytes may.
    """
    if not compression:
        return packed
    stream = _GzipStream(packed) if compression == "gz" else _ZstdStream(packed)
    return _Unpacked(stream, Allowance(where, size))


class _SourceBytes(io.RawIOBase):
    """The raw stream under `open_source`."""

    def __init__(self, file: SourceFile) -> None:
        self._file = file
        with reading(file):
            packed = open(file.path, "rb", -1 if file.compression else 0, opener=open_regular)  # noqa: SIM115
            self._stream: Any = unpacked(packed, file.compression, file.name, file.size)

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
    """The module's own leaves a file open that it has not opened."""

    def __init__(self, packed: IO[bytes]) -> None:
        super().__init__(fileobj=packed, mode="rb")
        self._packed = packed

    def close(self) -> None:
        super().close()
        self._packed.close()


class _ZstdStream(io.RawIOBase):
    """Decompressed bytes of a .zst, of any number of frames; unlike zstandard's own reader it raises
    when the file ends inside a frame."""

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
                    # The first frame's window was compared with what is free; no later one may take more.
                    window = max(_window_of(data), COMMON_WINDOW)
                    if window > COMMON_WINDOW and window > psutil.virtual_memory().available:
                        raise MemoryError
                    self._decompressor = self._zstandard.ZstdDecompressor(max_window_size=window)
                self._frame = self._decompressor.decompressobj()
            else:
                data = self._file.read(_ZSTD_INPUT_BYTES)
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


def _window_bytes(file: SourceFile) -> int:
    with reading(file), open(file.path, "rb", opener=open_regular) as stream:
        return _window_of(stream.read(_FRAME_HEADER_BYTES))


def _window_of(header: bytes) -> int:
    """The window of the .zst frame that begins so, as far as one may be; 0 for what is no frame, which its
    reader tells."""
    import zstandard

    try:
        return min(int(zstandard.get_frame_parameters(header).window_size), LONGEST_WINDOW)
    except zstandard.ZstdError:
        return 0
