"""Which spans of a split's token stream make which row: the two ways of packing.

A row holds tokens of one tar file. Dim names: M rows requested, P pieces in them, S tar files.
"""

from __future__ import annotations

import fcntl
import hashlib
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass
from math import prod
from pathlib import Path
from typing import Protocol

import numpy as np
import xxhash

from llmtrain.corpus.token_split import TokenSplit
from llmtrain.data.datasets import packing
from llmtrain.data.datasets.samples import Recent
from llmtrain.errors import DataError
from llmtrain.files import disk_problem, open_no_follow, write_atomically
from llmtrain.reading import read_bytes

_COUNT_DTYPE = np.dtype("<i8")


@dataclass(frozen=True)
class Pieces:
    """P spans of the token stream that fill the M rows of a micro-batch; all arrays are (P,)."""

    rows: np.ndarray
    columns: np.ndarray
    """First column of each piece in its row."""
    starts: np.ndarray
    """First token of each piece in the stream."""
    lengths: np.ndarray
    contexts: np.ndarray | None = None
    """Number of first tokens of each piece that are context only, not targets; None: none."""


class Packing(Protocol):
    """A way to fill rows."""

    tar_sizes: np.ndarray
    """Number of rows of each tar file, int64 (S,)."""
    num_positions: int
    """Number of target positions in all rows that are not padding."""

    def pieces(self, rows: np.ndarray, tars: np.ndarray, numbers: np.ndarray) -> Pieces:
        """Return the pieces of row `numbers[i]` of tar file `tars[i]`, as row `rows[i]` of a
        micro-batch, row by row."""

    def document_begins(self, pieces: Pieces) -> tuple[np.ndarray, np.ndarray]:
        """Return (piece, offset within it) of each token that begins a document, except the first of a
        row."""


class Windows(Packing):
    """Rows that are windows of a tar file's tokens."""

    def __init__(self, split: TokenSplit, sequence_length: int) -> None:
        self._split = split
        self._length = sequence_length
        tokens = np.diff(split.tar_starts)
        self.tar_sizes = np.maximum(0, -(-(tokens - 1) // sequence_length))
        self.num_positions = int(np.maximum(0, tokens - 1).sum())

    def pieces(self, rows: np.ndarray, tars: np.ndarray, numbers: np.ndarray) -> Pieces:
        starts = self._split.tar_starts[tars] + numbers * self._length
        lengths = np.minimum(self._length + 1, self._split.tar_starts[tars + 1] - starts)
        return Pieces(rows, np.zeros_like(rows), starts, lengths)

    def document_begins(self, pieces: Pieces) -> tuple[np.ndarray, np.ndarray]:
        found, ends = self._split.document_ends(pieces.starts, pieces.lengths)
        inside = ends < pieces.lengths[found]
        return found[inside], ends[inside]


def counted_once(
    cache: Path | None, key: str, shape: tuple[int, ...], count: Callable[[], np.ndarray]
) -> np.ndarray:
    """Return the result of `count`, int64 of `shape`, which depends only on `key`.

    Counting takes about 5 ms per tar file, so it is done once per host: ranks that start together wait for
    the first, and later runs find its result in the folder `cache`.
    """
    if cache is None:
        return count()
    path = cache / "rows" / f"{hashlib.sha256(key.encode()).hexdigest()}.counts"
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with open_no_follow(path.with_suffix(".lock"), "a") as file:
            with suppress(OSError):
                fcntl.flock(file, fcntl.LOCK_EX)
            if (found := _read_counts(path, shape)) is not None:
                return found
            counts = count()
            content = counts.astype(_COUNT_DTYPE).tobytes()
            write_atomically(path, xxhash.xxh3_128_digest(content) + content)
            return counts
    except OSError as error:
        raise DataError(disk_problem(error, path, key="data.cache.dir")) from error


def _read_counts(path: Path, shape: tuple[int, ...]) -> np.ndarray | None:
    """Return what `counted_once` wrote; None if it is missing or damaged."""
    size = xxhash.xxh3_128().digest_size
    expected = size + prod(shape) * _COUNT_DTYPE.itemsize
    try:
        content = read_bytes(path, expected)
    except OSError:
        return None
    if len(content) != expected or xxhash.xxh3_128_digest(content[size:]) != content[:size]:
        return None
    return np.frombuffer(content, _COUNT_DTYPE, offset=size).astype(np.int64).reshape(shape)


class BestFit(Packing):
    """Rows that hold whole documents, or parts of documents longer than a row."""

    def __init__(self, split: TokenSplit, sequence_length: int, overlap: int, cache: Path | None) -> None:
        self._split = split
        self._width = sequence_length + 1
        # A part's first token is the last target of the previous part, in addition to the overlap.
        self._overlap = overlap + 1
        key = f"{split.identity}/{self._width}/{self._overlap}"
        # Rows, and target positions that are not padding.
        counts = counted_once(cache, key, (len(split.tar_names), 2), self._count)
        self.tar_sizes = counts[:, 0]
        self.num_positions = int(counts[:, 1].sum())
        self._recent: Recent[packing.Rows] = Recent()

    def pieces(self, rows: np.ndarray, tars: np.ndarray, numbers: np.ndarray) -> Pieces:
        parts = []
        for tar in np.unique(tars).tolist():
            chosen = np.flatnonzero(tars == tar)
            plan = self._plan(tar)
            first, last = (plan.first_piece[numbers[chosen] + i] for i in (0, 1))
            counts = last - first
            inside = np.arange(int(counts.sum())) - np.repeat(np.cumsum(counts) - counts - first, counts)
            lengths = plan.lengths[inside].astype(np.int64)
            ends = np.cumsum(lengths)
            row_begins = np.repeat((ends - lengths)[np.cumsum(counts) - counts], counts)
            columns = ends - lengths - row_begins
            starts = plan.starts[inside] + self._split.tar_starts[tar]
            parts.append((np.repeat(rows[chosen], counts), columns, starts, lengths, plan.contexts[inside]))
        if not parts:
            return Pieces(*[np.empty(0, np.int64) for _ in range(5)])
        return Pieces(*(np.concatenate(column) for column in zip(*parts, strict=True)))

    def document_begins(self, pieces: Pieces) -> tuple[np.ndarray, np.ndarray]:
        found = np.flatnonzero(pieces.columns)
        return found, np.zeros_like(found)

    def _count(self) -> np.ndarray:
        """Return (rows, target positions that are not padding) of each tar file, int64 (S, 2)."""
        counts = np.array(
            [
                packing.count_rows(lengths, self._width, self._overlap)
                for lengths in self._split.document_lengths()
            ],
            dtype=np.int64,
        )
        # A row's first token is not a target.
        counts[:, 1] -= counts[:, 0]
        return counts

    def _plan(self, tar: int) -> packing.Rows:
        if (known := self._recent.get(tar)) is not None:
            return known
        plan = packing.best_fit(self._split.lengths_of(tar), self._width, self._overlap)
        return self._recent.keep(tar, plan)
