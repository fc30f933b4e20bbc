"""Rows of pairs: each holds whole pairs of a source and a target.

Dim names: M samples of a micro-batch, S places of sources, T places of targets, P pairs, N pairs of a shard
that fit into a row, R rows of a shard.
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


class _Shard(NamedTuple):
    """The pairs of one shard that fit into a row, and its rows, all int64."""

    numbers: np.ndarray
    """Of each among all pairs of the shard, (N,)."""
    starts: np.ndarray
    """Where the source and the target of each begin in the stream, (2, N)."""
    lengths: np.ndarray
    """Tokens of each with their ends, (2, N)."""
    first_pairs: np.ndarray
    """Row r holds the pairs [first_pairs[r], first_pairs[r + 1]), (R + 1,)."""


class PairedRows(SamplesOfSplit):
    """Pairs in the corpus' order, as many in a row as fit into both its sides (next fit).

    Sources and targets end with the end of their document. A pair that is longer than a row, on either
    side, is in none. A row's pairs are of one shard.
    """

    def __init__(
        self, split: TokenSplit, source_length: int, target_length: int, *, cache: Path | None = None
    ) -> None:
        """cache: a folder that remembers how many rows each shard makes.

        Raises DataError for a split in which no pair fits, and for documents that are no pairs."""
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
        self._recent: Recent[_Shard] = Recent()

    @property
    def tokens_per_sample(self) -> float:
        """Mean tokens of a row, of both sides."""
        return self._num_tokens / len(self)

    def get(self, indices: np.ndarray) -> dict[str, np.ndarray]:
        """{"sources": int64 (M, S), "targets": int64 (M, T); "source_documents": int32 (M, S), "documents":
        int32 (M, T): the pair's number within the row, from 0, PADDING_DOCUMENT where no token is}."""
        M, (S, T) = len(indices), self._widths
        W = S + T
        ids = np.zeros((M, W), dtype=self._split.dtype)
        documents = np.full((M, W), PADDING_DOCUMENT, dtype=np.int32)
        rows, numbers, starts, lengths = self._pairs(indices)
        # Within a row each side's tokens stand one behind the other.
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
        """(shard, document, tokens) of each source and its target in a sample: the shard's name, the
        document's number within the shard, and its tokens."""
        shard = int(self._shards_of(np.array(index)))
        plan, row = self._plan(shard), index - int(self._firsts[shard])
        pairs = range(int(plan.first_pairs[row]), int(plan.first_pairs[row + 1]))
        name = self._split.tar_names[shard]
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
        """Of each pair in the samples, row by row: its row in the micro-batch and its number there, (P,);
        starts in the stream and lengths of both sides, (2, P)."""
        found = [(np.empty(0, np.int64),) * 2 + (np.empty((2, 0), np.int64),) * 2]
        shards = self._shards_of(indices)
        for shard in np.unique(shards[indices != EMPTY]).tolist():
            plan = self._plan(shard)
            chosen = np.flatnonzero((shards == shard) & (indices != EMPTY))
            inside = indices[chosen] - self._firsts[shard]
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
        """(rows, pairs in them, their tokens, pairs left out) of each shard, int64 (shards, 4)."""
        counts = []
        for with_ends in self._split.document_lengths():
            lengths = self._sides(with_ends)
            kept = lengths[:, self._fits(lengths)]
            rows = len(self._first_pairs(kept)) - 1
            counts.append((rows, kept.shape[1], int(kept.sum()), lengths.shape[1] - kept.shape[1]))
        return np.array(counts, dtype=np.int64).reshape(-1, 4)

    def _plan(self, shard: int) -> _Shard:
        if (known := self._recent.get(shard)) is not None:
            return known
        lengths = self._sides(self._split.lengths_of(shard))
        ends = np.cumsum(lengths.T.reshape(-1)).reshape(-1, 2).T + self._split.tar_starts[shard]
        numbers = np.flatnonzero(self._fits(lengths))
        kept = lengths[:, numbers]
        plan = _Shard(numbers, ends[:, numbers] - kept, kept, self._first_pairs(kept))
        return self._recent.keep(shard, plan)

    def _sides(self, with_ends: np.ndarray) -> np.ndarray:
        """Documents' lengths in turn → those of sources and of targets, int64 (2, pairs)."""
        if len(with_ends) % 2:
            got = f"a shard of {len(with_ends):,} documents"
            raise DataError(Problem(f"split {self._split.name}", got, "two for each pair", PREPARE_AGAIN))
        return with_ends.astype(np.int64).reshape(-1, 2).T

    def _fits(self, lengths: np.ndarray) -> np.ndarray:
        return np.all(lengths <= np.array(self._widths)[:, None], axis=0)

    def _first_pairs(self, lengths: np.ndarray) -> np.ndarray:
        """The first pair of each row, and behind them all how many pairs there are, int64 (R + 1,)."""
        N = lengths.shape[1]
        behind = np.full(N, N)
        for side, width in zip(lengths, self._widths, strict=True):
            ends = np.concatenate([np.zeros(1, np.int64), np.cumsum(side)])
            behind = np.minimum(behind, np.searchsorted(ends, ends[:-1] + width, side="right") - 1)
        following, firsts = behind.tolist(), [0]
        while firsts[-1] < N:
            firsts.append(following[firsts[-1]])
        return np.array(firsts, dtype=np.int64)
