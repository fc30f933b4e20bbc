"""Write tensors to a safetensors file one after another, and compute its checksum meanwhile: nothing is
read back, and the data is not copied as a whole."""

from __future__ import annotations

import ctypes
import errno
import json
import os
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import NamedTuple

import torch
import xxhash

DTYPES = {torch.float64: "F64", torch.float32: "F32", torch.float16: "F16", torch.bfloat16: "BF16"}
"""dtype → its name in the format."""
CHUNK_BYTES = 2**24
"""Bytes per write: large enough that the overhead of calls is small, small enough that the disk starts
early."""
ALIGNMENT = 8
_START_WRITING = 2  # SYNC_FILE_RANGE_WRITE


class Written(NamedTuple):
    """Size and checksum of a file."""

    bytes: int
    checksum: str
    """xxh3-128 of its content, in hex."""


def write_safetensors(
    path: Path,
    tensors: Sequence[tuple[str, torch.Tensor]],
    go_on: Callable[[], bool] = lambda: True,
    fetch: Callable[[str], torch.Tensor] | None = None,
) -> Written:
    """Write `tensors` (key, contiguous tensor on any device) to a new file, and wait until it is on disk.

    Tensors on other devices are copied to the host one at a time. With `fetch`, tensors may be on the meta
    device, and `fetch` returns the values for each key. `go_on` is called before each chunk; if it returns
    False, raise InterruptedError and leave the file incomplete. Raise OSError if the disk is full, at once
    if the file system can tell in advance.
    """
    header = _header(tensors)
    digest = xxhash.xxh3_128()
    total = len(header) + sum(tensor.nbytes for _, tensor in tensors)
    descriptor = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o666)
    try:
        _reserve(descriptor, total)
        at = _write(descriptor, memoryview(header), 0, digest, go_on)
        for key, tensor in tensors:
            content = _content(tensor if fetch is None else fetch(key))
            if len(content) != tensor.nbytes:
                raise ValueError(f"{key}: {len(content)} bytes where {tensor.nbytes} were announced")
            at = _write(descriptor, content, at, digest, go_on)
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
    return Written(total, digest.hexdigest())


def _header(tensors: Sequence[tuple[str, torch.Tensor]]) -> bytes:
    """Return the header: the length of the rest, 8 bytes little-endian, and JSON with the offsets of each
    tensor's data, padded with spaces for alignment."""
    entries: dict[str, dict[str, object]] = {}
    at = 0
    for key, tensor in tensors:
        if key in entries:
            raise ValueError(f"two tensors with the key {key}")
        span = [at, at + tensor.nbytes]
        entries[key] = {"dtype": DTYPES[tensor.dtype], "shape": list(tensor.shape), "data_offsets": span}
        at = span[1]
    text = json.dumps(entries, separators=(",", ":")).encode()
    text += b" " * (-len(text) % ALIGNMENT)
    return len(text).to_bytes(8, "little") + text


def _content(tensor: torch.Tensor) -> memoryview:
    return tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy().data


def _write(
    descriptor: int, data: memoryview, at: int, digest: xxhash.xxh3_128, go_on: Callable[[], bool]
) -> int:
    """Write `data` at byte `at` of the file and return the offset of their end."""
    for start in range(0, len(data), CHUNK_BYTES):
        if not go_on():
            raise InterruptedError("writing was canceled")
        chunk = data[start : start + CHUNK_BYTES]
        digest.update(chunk)
        done = 0
        while done < len(chunk):
            done += os.write(descriptor, chunk[done:])
        _start_writing(descriptor, at + start, len(chunk))
    return at + len(data)


def _libc() -> ctypes.CDLL | None:
    if sys.platform != "linux":
        return None
    try:
        library = ctypes.CDLL(None, use_errno=True)
        offset, descriptor = ctypes.c_int64, ctypes.c_int
        library.fallocate.argtypes = [descriptor, ctypes.c_int, offset, offset]
        library.sync_file_range.argtypes = [descriptor, offset, offset, ctypes.c_uint]
    except (OSError, AttributeError):  # another C library
        return None
    return library


_LIBC = _libc()


def _reserve(descriptor: int, total: int) -> None:
    """Reserve the file's space, so that its blocks are contiguous and a full disk is known in advance.

    Not by posix_fallocate, which writes a byte to each block on file systems that cannot reserve.
    """
    if _LIBC is not None and _LIBC.fallocate(descriptor, 0, 0, total) != 0:
        number = ctypes.get_errno()
        if number in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG):
            raise OSError(number, os.strerror(number))


def _start_writing(descriptor: int, start: int, length: int) -> None:
    """Start writing these bytes to disk in the background; only fsync waits for them."""
    if _LIBC is not None:
        _LIBC.sync_file_range(descriptor, start, length, _START_WRITING)
