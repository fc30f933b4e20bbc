"""Store cleaned documents on disk between the phases of prepare, in blocks of about BLOCK_BYTES in source
order.

A block consists of three files: NAME.text (the concatenated documents), NAME.documents.npy (end offset and
key of each document) and NAME.hashes.npy (the hashes, sorted, so that the search for duplicates can read any
range of hashes without loading the rest).
"""

from __future__ import annotations

import mmap
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import IO

import numpy as np

from llmtrain.prepare.clean import digests, split_of
from llmtrain.prepare.config import SplitConfig

BLOCK_BYTES = 16 << 20
# Documents per range of hashes; a range is sorted in memory, in about 100 MB.
RANGE_DOCUMENTS = 2_000_000

DOCUMENT_DTYPE = np.dtype([("end", "<u8"), ("key", "<u8")])
HASH_DTYPE = np.dtype([("high", "<u8"), ("low", "<u8"), ("document", "<u4")])
DROPPED_DTYPE = np.dtype([("block", "<u4"), ("document", "<u4")])


@dataclass(frozen=True)
class DocumentBlock:
    """A finished block of documents."""

    path: Path
    """Common prefix of its files."""
    num_documents: int
    num_bytes: int
    is_tokenized: bool = False
    """Whether the documents are token ids, little-endian uint32, instead of UTF-8."""

    @property
    def text_path(self) -> Path:
        return self.path.with_name(self.path.name + ".text")

    @property
    def documents_path(self) -> Path:
        return self.path.with_name(self.path.name + ".documents.npy")

    @property
    def hashes_path(self) -> Path:
        return self.path.with_name(self.path.name + ".hashes.npy")

    def documents(self) -> np.ndarray:
        """Return an array (num_documents,) of DOCUMENT_DTYPE."""
        return np.load(self.documents_path)

    def read(
        self, documents: np.ndarray, chosen: np.ndarray, batch_bytes: int = 1 << 20
    ) -> Iterator[list[bytes]]:
        """Yield the bytes of some documents, in batches of about `batch_bytes`.

        documents: the result of `documents()`; chosen: ascending document numbers in the block.
        """
        if not len(chosen):
            return
        ends = documents["end"]
        starts = np.concatenate([np.zeros(1, ends.dtype), ends[:-1]])
        sizes = np.cumsum(ends[chosen] - starts[chosen])
        borders = np.searchsorted(sizes, np.arange(batch_bytes, int(sizes[-1]), batch_bytes))
        with (
            open(self.text_path, "rb") as file,
            mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as text,
        ):
            for numbers in np.split(chosen, np.unique(borders)):
                pairs = zip(starts[numbers].tolist(), ends[numbers].tolist(), strict=True)
                if batch := [text[start:end] for start, end in pairs]:
                    yield batch


class DocumentBlockWriter:
    """Writes documents into the blocks of a folder; `close` finishes the last block and returns all."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self._blocks: list[DocumentBlock] = []
        self._sizes: list[int] = []
        self._digests: list[np.ndarray] = []
        self._num_bytes = 0
        self._file: IO[bytes] | None = None
        self._is_tokenized = False

    def add(self, documents: Sequence[bytes], is_tokenized: bool = False) -> None:
        """Append documents. Texts and token ids go to separate blocks."""
        if not documents:
            return
        if self._file is not None and self._is_tokenized != is_tokenized:
            self._end_block()
        self._is_tokenized = is_tokenized
        path = self._folder / f"{len(self._blocks):06d}"
        if self._file is None:
            self._file = open(path.with_name(path.name + ".text"), "wb")  # noqa: SIM115
        self._num_bytes += self._file.write(b"".join(documents))
        self._sizes.extend(map(len, documents))
        self._digests.append(digests(documents))
        if self._num_bytes >= BLOCK_BYTES:
            self._end_block()

    def close(self) -> list[DocumentBlock]:
        if self._file is not None:
            self._end_block()
        return self._blocks

    def _end_block(self) -> None:
        assert self._file is not None
        self._file.close()
        path = self._folder / f"{len(self._blocks):06d}"
        block = DocumentBlock(path, len(self._sizes), self._num_bytes, self._is_tokenized)
        high, low = np.concatenate(self._digests).T
        documents = np.empty(block.num_documents, DOCUMENT_DTYPE)
        documents["end"] = np.cumsum(self._sizes, dtype=np.uint64)
        documents["key"] = low
        order = np.lexsort((low, high))
        hashes = np.empty(block.num_documents, HASH_DTYPE)
        hashes["high"], hashes["low"], hashes["document"] = high[order], low[order], order
        save_array(block.documents_path, documents)
        save_array(block.hashes_path, hashes)
        self._blocks.append(block)
        self._sizes, self._digests, self._num_bytes, self._file = [], [], 0, None


def save_array(path: Path, array: np.ndarray) -> None:
    """Save as np.save does, but keep the errno of an OSError, by which a full disk is recognized."""
    with open(path, "wb") as file:
        np.lib.format.write_array_header_1_0(file, np.lib.format.header_data_from_array_1_0(array))
        file.write(np.ascontiguousarray(array).data.cast("B") if array.size else b"")


# ---------------------------------------------------------------------------------------- duplicates


def num_ranges(blocks: Sequence[DocumentBlock]) -> int:
    """Return the number of ranges into which the hashes are divided for the search for duplicates."""
    return max(1, -(-sum(block.num_documents for block in blocks) // RANGE_DOCUMENTS))


def duplicates(blocks: Sequence[DocumentBlock], hash_range: int, ranges: int) -> np.ndarray:
    """Return the documents of one range of hashes that equal an earlier document: DROPPED_DTYPE,
    ascending."""
    first = hash_range * 2**64 // ranges
    behind = (hash_range + 1) * 2**64 // ranges
    found, owners = [], []
    for number, block in enumerate(blocks):
        hashes = np.load(block.hashes_path, mmap_mode="r")
        start = np.searchsorted(hashes["high"], np.uint64(first))
        stop = len(hashes) if behind == 2**64 else np.searchsorted(hashes["high"], np.uint64(behind))
        found.append(np.array(hashes[start:stop]))
        owners.append(np.full(stop - start, number, np.uint32))
    merged, owner = np.concatenate(found), np.concatenate(owners)
    # lexsort is stable: documents of equal hash stay in source order.
    order = np.lexsort((merged["low"], merged["high"]))
    merged, owner = merged[order], owner[order]
    high, low = merged["high"], merged["low"]
    repeats = np.flatnonzero((high[1:] == high[:-1]) & (low[1:] == low[:-1])) + 1
    dropped = np.empty(len(repeats), DROPPED_DTYPE)
    dropped["block"], dropped["document"] = owner[repeats], merged["document"][repeats]
    return np.sort(dropped, order=["block", "document"])


def splits_of_block(
    documents: np.ndarray, number: int, dropped_paths: Sequence[Path], split: SplitConfig
) -> list[np.ndarray]:
    """Return the numbers of the block's kept documents in train, validation and test, each ascending.

    number: of the block; dropped_paths: files of DROPPED_DTYPE, sorted.
    """
    keep = np.ones(len(documents), dtype=bool)
    for path in dropped_paths:
        dropped = np.load(path, mmap_mode="r")
        start, stop = np.searchsorted(dropped["block"], np.array([number, number + 1], np.uint32))
        keep[dropped["document"][start:stop]] = False
    where = split_of(documents["key"], split.validation, split.test)
    return [np.flatnonzero(keep & (where == i)) for i in range(3)]
