"""Tensors to a safetensors file, one after another from where they lie, with the file's checksum made on
the way: nothing is read back, and no second copy of the data is held."""

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
"""As the format names them."""
CHUNK_BYTES = 2**24
"""Of one write: large enough that calls cost nothing, small enough that the disk starts at once."""
ALIGNMENT = 8
_START_WRITING = 2  # SYNC_FILE_RANGE_WRITE


class Written(NamedTuple):
    """A file as it was written."""

    bytes: int
    checksum: str
    """xxh3-128 of its content, in hex."""


def write_safetensors(
    path: Path,
    tensors: Sequence[tuple[str, torch.Tensor]],
    go_on: Callable[[], bool] = lambda: True,
    fetch: Callable[[str], torch.Tensor] | None = None,
) -> Written:
    """Write `tensors` (key, contiguous tensor on any device) to a new file and wait until it is on the disk.

    A tensor elsewhere comes to the host when its turn comes; with `fetch` those given may be on the meta
    device, and it is asked for each by its key. `go_on` is asked before each chunk; once it
    says no, InterruptedError is raised and the file stays unfinished. Raises OSError for a full disk, at
    once where the file system can tell beforehand.
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
    """The length of what follows, 8 bytes little-endian, and JSON that says where each tensor's data lies,
    filled up with spaces so that the data are aligned."""
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
    """Write `data`, which begin at byte `at` of the file; → where they end."""
    for start in range(0, len(data), CHUNK_BYTES):
        if not go_on():
            raise InterruptedError("writing was called off")
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
    """Take the file's space at once: blocks lie together, and a full disk is known before the work.

    posix_fallocate would write a byte to each block where a file system cannot reserve.
    """
    if _LIBC is not None and _LIBC.fallocate(descriptor, 0, 0, total) != 0:
        number = ctypes.get_errno()
        if number in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG):
            raise OSError(number, os.strerror(number))


def _start_writing(descriptor: int, start: int, length: int) -> None:
    """Let the disk begin with these bytes while the next are made ready; only fsync waits for it."""
    if _LIBC is not None:
        _LIBC.sync_file_range(descriptor, start, length, _START_WRITING)
