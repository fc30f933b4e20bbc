"""Write the tar files of a corpus: webdataset tars whose arrays a reader finds by their byte offsets.

A sample is `KEY.tokens.npy`, the token ids of many whole documents, each followed by the end-of-document id,
and `KEY.ends.npy`, where each document ends. `index.npy` of a split holds one INDEX_DTYPE row a sample, so
that a reader finds any sample without reading the tar; `lengths.npy` holds the number of tokens of each
document, end-of-document id included, in stream order, so that rows are planned without reading a tar. The
bytes depend only on the tokens: times, owners and modes in the tar are fixed.
"""

from __future__ import annotations

import io
import tarfile
from collections.abc import Iterable
from dataclasses import dataclass
from itertools import chain
from pathlib import Path
from typing import IO, Any

import numpy as np
import xxhash

from llmtrain.errors import DataError
from llmtrain.files import atomic_writer, write_atomically

INDEX_DTYPE = np.dtype(
    [
        ("shard", "<u4"),  # index in the manifest's list of tar files
        ("tokens_offset", "<u8"),  # byte of the tar where the token ids begin, after the npy header
        ("ends_offset", "<u8"),  # byte of the tar where the document ends begin
        ("num_tokens", "<u8"),
        ("num_documents", "<u4"),
    ]
)
ENDS_DTYPE = np.dtype("<u4")
LENGTHS_DTYPE = np.dtype("<u4")
TAR_BLOCK = 512
NPY_HEADER_BYTES = 128  # of an array of one dimension and a plain type


class TarFileError(DataError):
    """A tar file that cannot be had or does not match the manifest; training may go on without it."""


@dataclass(frozen=True)
class Sample:
    """Whole documents.

    tokens: (num_tokens,) uint16 or uint32. ends: (num_documents,) uint32, the last == num_tokens.
    """

    key: str
    tokens: np.ndarray
    ends: np.ndarray


def token_dtype(vocab_size: int) -> np.dtype:
    """Return the smallest unsigned type that holds every id."""
    return np.dtype("<u2") if vocab_size <= 1 << 16 else np.dtype("<u4")


def sample_bytes(num_tokens: int, num_documents: int, dtype: np.dtype) -> int:
    """Return the bytes of a sample in a tar: two members, each with its tar and npy headers, padded."""
    arrays = (num_tokens * dtype.itemsize, num_documents * ENDS_DTYPE.itemsize)
    return sum(TAR_BLOCK + -(-(NPY_HEADER_BYTES + size) // TAR_BLOCK) * TAR_BLOCK for size in arrays)


def write_tar_file(path: Path, samples: Iterable[Sample], number: int) -> tuple[dict[str, Any], np.ndarray]:
    """Write one tar file; return its manifest entry and its INDEX_DTYPE rows.

    number: its index in the split's list of tar files.
    """
    rows: list[tuple[int, int, int, int, int]] = []
    path.parent.mkdir(parents=True, exist_ok=True)
    with atomic_writer(path) as file:
        tar = _Tar(file)
        for sample in samples:
            tokens_offset = tar.add_array(f"{sample.key}.tokens.npy", sample.tokens)
            ends_offset = tar.add_array(f"{sample.key}.ends.npy", sample.ends.astype(ENDS_DTYPE, copy=False))
            rows.append((number, tokens_offset, ends_offset, len(sample.tokens), len(sample.ends)))
        tar.close()
    index = np.array(rows, dtype=INDEX_DTYPE)
    entry = {
        "file": f"{path.parent.name}/{path.name}",
        "bytes": tar.offset,
        "xxh3_128": tar.checksum.hexdigest(),
        "num_samples": len(rows),
        "num_tokens": int(index["num_tokens"].sum()),
        "num_documents": int(index["num_documents"].sum(dtype=np.uint64)),
    }
    return entry, index


def write_index(path: Path, rows: np.ndarray) -> str:
    """Write a split's index.npy; return its xxh3_128."""
    data = _npy_header(rows.dtype, rows.shape) + rows.tobytes()
    path.parent.mkdir(parents=True, exist_ok=True)
    write_atomically(path, data)
    return xxhash.xxh3_128_hexdigest(data)


def write_lengths(path: Path, num_documents: int, pieces: Iterable[np.ndarray]) -> str:
    """Write a split's lengths.npy; return its xxh3_128.

    pieces: arrays with the lengths of its documents, together in stream order.
    """
    checksum = xxhash.xxh3_128()
    path.parent.mkdir(parents=True, exist_ok=True)
    with atomic_writer(path) as file:
        header = _npy_header(LENGTHS_DTYPE, (num_documents,))
        for data in chain([header], (piece.astype(LENGTHS_DTYPE).tobytes() for piece in pieces)):
            file.write(data)
            checksum.update(data)
    return checksum.hexdigest()


class _Tar:
    """An append-only ustar stream that tracks its offset and checksum."""

    def __init__(self, file: IO[bytes]) -> None:
        self.file = file
        self.offset = 0
        self.checksum = xxhash.xxh3_128()

    def add_array(self, name: str, array: np.ndarray) -> int:
        """Append `array` as an npy member; return the byte offset of its data."""
        header = _npy_header(array.dtype, array.shape)
        member = tarfile.TarInfo(name)
        member.size = len(header) + array.nbytes
        member.mode = 0o644
        self._write(member.tobuf(tarfile.USTAR_FORMAT))
        self._write(header)
        data_offset = self.offset
        self._write(np.ascontiguousarray(array).data.cast("B") if array.size else b"")
        self._write(bytes(-self.offset % TAR_BLOCK))
        return data_offset

    def close(self) -> None:
        self._write(bytes(2 * TAR_BLOCK))

    def _write(self, data: bytes | memoryview) -> None:
        self.file.write(data)
        self.checksum.update(data)
        self.offset += len(data)


def _npy_header(dtype: np.dtype, shape: tuple[int, ...]) -> bytes:
    buffer = io.BytesIO()
    description = {
        "descr": np.lib.format.dtype_to_descr(dtype),
        "fortran_order": False,
        "shape": shape,
    }
    np.lib.format.write_array_header_1_0(buffer, description)
    return buffer.getvalue()
