"""The arrays beside the tar files of a split: its index and the lengths of its documents, read and
checked."""

from __future__ import annotations

import numpy as np
import psutil

from llmtrain.corpus.location import Location
from llmtrain.corpus.manifest import MANIFEST_NAME, PREPARE_AGAIN, SplitEntry
from llmtrain.corpus.npy import parse_array
from llmtrain.corpus.tar_files import ENDS_DTYPE, INDEX_DTYPE, LENGTHS_DTYPE, NPY_HEADER_BYTES
from llmtrain.errors import DataError, Problem

_LONGEST_HEADER = 4096
"""Upper bound of the bytes before the data of an array."""


def read_index(location: Location, entry: SplitEntry, dtype: np.dtype) -> np.ndarray:
    """Return the split's index, INDEX_DTYPE, one row a sample.

    dtype: that of the token ids. Raises DataError unless each array that it names lies within its tar file.
    """
    index = _read_array(location, entry.index, entry.index_xxh3_128, INDEX_DTYPE, entry.num_samples)
    sizes = np.array([tar.bytes for tar in entry.shards], dtype=np.uint64)
    numbers = index["shard"]
    # Ascending, since the samples of a tar file are found by binary search.
    fits = numbers < len(sizes)
    fits[1:] &= numbers[1:] >= numbers[:-1]
    room = sizes[np.where(fits, numbers, 0)] if len(sizes) else np.zeros(len(index), np.uint64)
    for offset, count, itemsize in (
        ("tokens_offset", "num_tokens", dtype.itemsize),
        ("ends_offset", "num_documents", ENDS_DTYPE.itemsize),
    ):
        begins = index[offset]
        fits &= (begins >= NPY_HEADER_BYTES) & (begins <= room)
        fits &= index[count] <= (room - np.minimum(begins, room)) // np.uint64(itemsize)
    if not fits.all():
        got = f"a sample {int(np.argmin(fits)):,} that lies in no tar file"
        raise DataError(Problem(location.name(entry.index), got, "samples of its tar files", PREPARE_AGAIN))
    return index


def check_index(location: Location, entry: SplitEntry, found: np.ndarray, expected: np.ndarray) -> None:
    """Raise DataError unless index and manifest agree on where each tar file begins in the stream.

    found, expected: position of the first token of each tar file, and the end, by the index and by the
    manifest.
    """
    wrong = np.flatnonzero(found != expected)
    if len(wrong):
        tar = entry.shards[max(0, int(wrong[0]) - 1)]
        got = f"another number of tokens in {tar.file} than the manifest's"
        raise DataError(Problem(location.name(entry.index), got, f"{tar.num_tokens:,}", PREPARE_AGAIN))


def read_lengths(location: Location, entry: SplitEntry) -> list[np.ndarray]:
    """Return the number of tokens of each document, its end-of-document id included, for each tar file.

    Raises DataError for a corpus of version 1, which has no lengths.npy, and for lengths that do not add up.
    """
    if entry.lengths is None:
        remedy = "prepare the corpus again, or give data.packing=concat"
        where = location.name(MANIFEST_NAME)
        raise DataError(Problem(where, "a corpus of version 1, without lengths.npy", "", remedy))
    file, checksum = entry.lengths, entry.lengths_xxh3_128
    lengths = _read_array(location, file, checksum, LENGTHS_DTYPE, entry.num_documents)
    counts = np.cumsum([tar.num_documents for tar in entry.shards])
    by_tar = np.split(lengths, counts[:-1])
    for tar, found in zip(entry.shards, by_tar, strict=True):
        tokens = int(found.sum(dtype=np.int64))
        if tokens != tar.num_tokens or not found.all():
            got = f"documents of {tar.file} of {tokens:,} tokens together"
            allowed = f"{tar.num_tokens:,}, each with one or more"
            raise DataError(Problem(location.name(file), got, allowed, PREPARE_AGAIN))
    return by_tar


def _read_array(
    location: Location, file: str, xxh3_128: str | None, dtype: np.dtype, length: int
) -> np.ndarray:
    """Return an array of the corpus, held in memory. Raises DataError for one of another type or length, and
    for one larger than the free memory."""
    where, size = location.name(file), length * dtype.itemsize
    if size > (free := psutil.virtual_memory().available):
        raise DataError(Problem(where, f"{size:,} bytes", f"{free:,}, the memory that is free"))
    content = location.read(file, size + _LONGEST_HEADER, xxh3_128)
    try:
        array = parse_array(content)
        if array.dtype != dtype or array.shape != (length,):
            raise ValueError(f"an array of {array.dtype} of the shape {array.shape}")
    except ValueError as error:
        raise DataError(Problem(where, str(error), f"{length:,} of {dtype}", PREPARE_AGAIN)) from None
    return array
