"""Rows of pairs: each holds whole pairs of a source and a target.

Dim names: M samples of a micro-batch, S positions of sources, T positions of targets, P pairs, N pairs of
a tar file that fit into a row, R rows of a tar file.
"""

from __future__ import annotations

from pathlib import Path
from typing import NamedTuple

import numpy as np

from llmtrain.corpus.manifest import PREPARE_AGAIN
from llmtrain.corpus.token_split import TokenSplit
from llmtrain.data.datasets.base import EMPTY, PADDING_DOCUMENT
from llmtrain.data.datasets.rows import counted_once
from llmtrain.data.datasets.samples import Recent, SamplesOfSplit
from llmtrain.errors import DataError, Problem


class _Tar(NamedTuple):
    """The pairs of one tar file that fit into a row, and its rows, all int64."""

    numbers: np.ndarray
    """Number of each pair among all pairs of the tar file, (N,)."""
    starts: np.ndarray
    """First token in the stream of each source and target, (2, N)."""
    lengths: np.ndarray
    """Tokens of each source and target, end included, (2, N)."""
    first_pairs: np.ndarray
    """Row r holds the pairs [first_pairs[r], first_pairs[r + 1]), (R + 1,)."""


class PairedRows(SamplesOfSplit):
    """Pairs in the order of the corpus, as many per row as fit on both sides (next fit).

    Sources and targets end with their document's end token. A pair that is longer than a row on either
    side is left out. The pairs of a row are from one tar file.
    """

    def __init__(
        self, split: TokenSplit, source_length: int, target_length: int, *, cache: Path | None = None
    ) -> None:
        """cache: a folder that caches the number of rows of each tar file.

        Raise DataError if no pair of the split fits, or if its documents are not pairs.
        """
        super().__init__(split, f"{source_length}/{target_length}/paired")
        self._widths = (source_length, target_length)
        key = f"{split.identity}/{source_length}/{target_length}/paired"
        counts = counted_once(cache, key, (len(split.tar_names), 4), self._count)
        self._set_sizes(counts[:, 0])
        self._num_pairs, self._num_tokens, self._num_left_out = counts[:, 1:].sum(axis=0).tolist()
        if len(self) == 0:
            got = f"no pair of up to {source_length} and {target_length} tokens"
            remedy = "give a longer batch.sequence_length, or prepare more text"
            raise DataError(Problem(f"split {split.name}", got, "1 or more", remedy))
        self._recent: Recent[_Tar] = Recent()

    @property
    def tokens_per_sample(self) -> float:
        """Mean tokens of a row, both sides together."""
        return self._num_tokens / len(self)

    def get(self, indices: np.ndarray) -> dict[str, np.ndarray]:
        """Return "sources" int64 (M, S) and "targets" int64 (M, T); "source_documents" int32 (M, S) and
        "documents" int32 (M, T), the pair's number within the row, from 0, PADDING_DOCUMENT at padding."""
        M, (S, T) = len(indices), self._widths
        W = S + T
        ids = np.zeros((M, W), dtype=self._split.dtype)
        documents = np.full((M, W), PADDING_DOCUMENT, dtype=np.int32)
        rows, numbers, starts, lengths = self._pairs(indices)
        # Within a row each side's pieces are contiguous.
        ends = np.cumsum(lengths, axis=1)
        begins_of_rows = np.maximum.accumulate(np.where(numbers == 0, ends - lengths, 0), axis=1)
        places = rows * W + np.array([[0], [S]]) + ends - lengths - begins_of_rows
        self._split.read_spans(starts.reshape(-1), lengths.reshape(-1), ids.reshape(-1), places.reshape(-1))
        counts = lengths.reshape(-1)
        within = np.arange(int(counts.sum())) - np.repeat(np.cumsum(counts) - counts, counts)
        documents.reshape(-1)[np.repeat(places.reshape(-1), counts) + within] = np.repeat(
            np.tile(numbers, 2), counts
        )
        return {
            "sources": ids[:, :S].astype(np.int64),
            "targets": ids[:, S:].astype(np.int64),
            "source_documents": np.ascontiguousarray(documents[:, :S]),
            "documents": np.ascontiguousarray(documents[:, S:]),
        }

    def where(self, index: int) -> list[tuple[str, int, int]]:
        """Return (tar file, document, tokens) for each source and target of a sample: the tar file's name,
        the document's number within it, and its tokens."""
        tar = int(self._tars_of(np.array(index)))
        plan, row = self._plan(tar), index - int(self._firsts[tar])
        pairs = range(int(plan.first_pairs[row]), int(plan.first_pairs[row + 1]))
        name = self._split.tar_names[tar]
        return [
            (name, 2 * int(plan.numbers[pair]) + side, int(plan.lengths[side, pair]))
            for pair in pairs
            for side in (0, 1)
        ]

    def describe(self) -> str:
        S, T = self._widths
        left_out = f"; {self._num_left_out:,} longer pairs left out" if self._num_left_out else ""
        padding = 100 * (1 - self._num_tokens / (len(self) * (S + T)))
        return (
            f"{self._split.name}: {self._num_tokens:,} tokens of {self._num_pairs:,} pairs "
            f"in {len(self):,} rows of {S} and {T}, {padding:.1f} % padding{left_out}"
        )

    def _pairs(self, indices: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray]:
        """Return, for each pair of the samples, row by row: its row in the micro-batch and its number in
        that row, (P,); starts in the stream and lengths of both sides, (2, P)."""
        found = [(np.empty(0, np.int64),) * 2 + (np.empty((2, 0), np.int64),) * 2]
        tars = self._tars_of(indices)
        for tar in np.unique(tars[indices != EMPTY]).tolist():
            plan = self._plan(tar)
            chosen = np.flatnonzero((tars == tar) & (indices != EMPTY))
            inside = indices[chosen] - self._firsts[tar]
            first, last = plan.first_pairs[inside], plan.first_pairs[inside + 1]
            counts = last - first
            numbers = np.arange(int(counts.sum())) - np.repeat(np.cumsum(counts) - counts, counts)
            pairs = numbers + np.repeat(first, counts)
            found.append((np.repeat(chosen, counts), numbers, plan.starts[:, pairs], plan.lengths[:, pairs]))
        rows, numbers, starts, lengths = (
            np.concatenate(column, axis=-1) for column in zip(*found, strict=True)
        )
        return rows, numbers, starts, lengths

    def _count(self) -> np.ndarray:
        """Return (rows, pairs in them, tokens in them, pairs left out) for each tar file, int64 (S, 4)."""
        counts = []
        for with_ends in self._split.document_lengths():
            lengths = self._sides(with_ends)
            kept = lengths[:, self._fits(lengths)]
            rows = len(self._first_pairs(kept)) - 1
            counts.append((rows, kept.shape[1], int(kept.sum()), lengths.shape[1] - kept.shape[1]))
        return np.array(counts, dtype=np.int64).reshape(-1, 4)

    def _plan(self, tar: int) -> _Tar:
        if (known := self._recent.get(tar)) is not None:
            return known
        lengths = self._sides(self._split.lengths_of(tar))
        ends = np.cumsum(lengths.T.reshape(-1)).reshape(-1, 2).T + self._split.tar_starts[tar]
        numbers = np.flatnonzero(self._fits(lengths))
        kept = lengths[:, numbers]
        plan = _Tar(numbers, ends[:, numbers] - kept, kept, self._first_pairs(kept))
        return self._recent.keep(tar, plan)

    def _sides(self, with_ends: np.ndarray) -> np.ndarray:
        """Return the lengths of sources and of targets, int64 (2, pairs), from those of alternating
        documents."""
        if len(with_ends) % 2:
            got = f"a tar file of {len(with_ends):,} documents"
            raise DataError(Problem(f"split {self._split.name}", got, "two for each pair", PREPARE_AGAIN))
        return with_ends.astype(np.int64).reshape(-1, 2).T

    def _fits(self, lengths: np.ndarray) -> np.ndarray:
        return np.all(lengths <= np.array(self._widths)[:, None], axis=0)

    def _first_pairs(self, lengths: np.ndarray) -> np.ndarray:
        """Return the first pair of each row, followed by the number of pairs, int64 (R + 1,)."""
        N = lengths.shape[1]
        behind = np.full(N, N)
        for side, width in zip(lengths, self._widths, strict=True):
            ends = np.concatenate([np.zeros(1, np.int64), np.cumsum(side)])
            behind = np.minimum(behind, np.searchsorted(ends, ends[:-1] + width, side="right") - 1)
        following, firsts = behind.tolist(), [0]
        while firsts[-1] < N:
            firsts.append(following[firsts[-1]])
        return np.array(firsts, dtype=np.int64)
