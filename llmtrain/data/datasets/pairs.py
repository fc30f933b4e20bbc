"""Passages of single documents, two per sample, from which objectives make sentence pairs.

Dim names: M samples of a micro-batch, L tokens of the longest passage, N documents of a tar file.
"""

from __future__ import annotations

from typing import NamedTuple

import numpy as np

from llmtrain.corpus.token_split import TokenSplit
from llmtrain.data.datasets.base import EMPTY
from llmtrain.data.datasets.samples import Recent, SamplesOfSplit
from llmtrain.data.order import sample_keys
from llmtrain.errors import DataError, Problem

SPECIAL = 3
"""Special tokens of a row: [CLS] and two [SEP]."""
SHORTEST_ROW = 16


class _Tar(NamedTuple):
    """Documents of one tar file that make passages, all int64."""

    starts: np.ndarray
    """First token in the stream of each document, (N,)."""
    lengths: np.ndarray
    """Tokens of each document without its end token, (N,)."""
    firsts: np.ndarray
    """Number of the first passage of each document, followed by the number of passages, (N + 1,)."""


class Passages(SamplesOfSplit):
    """Each document, without its end token, in as few passages of about equal length as fit into a row with
    its three special tokens. Documents of one token make none.

    A sample is a passage and a fixed passage of another document of the same tar file.
    """

    def __init__(self, split: TokenSplit, sequence_length: int) -> None:
        """Raise DataError if rows are too short or the split makes no passage."""
        if sequence_length < SHORTEST_ROW:
            allowed = f"{SHORTEST_ROW} or more with pairs of texts"
            raise DataError(Problem("batch.sequence_length", str(sequence_length), allowed))
        super().__init__(split, f"{sequence_length}/pairs")
        self.sequence_length = sequence_length
        self._longest = sequence_length - SPECIAL
        lengths = [_text_lengths(of_tar) for of_tar in split.document_lengths()]
        self._set_sizes(np.array([int(self._counts(n).sum()) for n in lengths], dtype=np.int64))
        self._num_tokens = sum(int(n[n > 1].sum()) for n in lengths)
        self._num_documents = sum(int((n > 1).sum()) for n in lengths)
        if len(self) == 0:
            remedy = "prepare more text, or a larger share for this split"
            raise DataError(Problem(f"split {split.name}", "no document of 2 tokens", "1 or more", remedy))
        self._recent: Recent[_Tar] = Recent()

    @property
    def tokens_per_sample(self) -> float:
        """Mean tokens of a passage."""
        return self._num_tokens / len(self)

    def get(self, indices: np.ndarray) -> dict[str, np.ndarray]:
        """Return "passages" and "others" int64 (M, L), a passage and one of another document;
        "passage_lengths" and "other_lengths" int64 (M,), 0 for EMPTY samples, and for others if a tar file
        has one document."""
        M = len(indices)
        starts, lengths = np.zeros((2, M), np.int64), np.zeros((2, M), np.int64)
        for tar in np.unique(self._tars_of(indices[indices != EMPTY])).tolist():
            first, last = self._firsts[tar], self._firsts[tar + 1]
            chosen = np.flatnonzero((indices >= first) & (indices < last))
            starts[:, chosen], lengths[:, chosen] = self._spans(tar, indices[chosen] - first)
        tokens = np.zeros((2, M, self._longest), dtype=self._split.dtype)
        read = lengths > 0
        places = np.arange(2 * M).reshape(2, M) * self._longest
        self._split.read_spans(starts[read], lengths[read], tokens.reshape(-1), places[read])
        passages, others = tokens.astype(np.int64)
        return {
            "passages": passages,
            "passage_lengths": lengths[0],
            "others": others,
            "other_lengths": lengths[1],
        }

    def describe(self) -> str:
        return (
            f"{self._split.name}: {self._num_tokens:,} tokens of {self._num_documents:,} documents "
            f"in {len(self):,} passages of up to {self._longest}"
        )

    def _spans(self, tar: int, numbers: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Return starts in the stream and lengths of the passages `numbers` of a tar file and of their
        others, each int64 (2, M)."""
        plan = self._plan(tar)
        N = len(plan.starts)
        documents = np.searchsorted(plan.firsts, numbers, side="right") - 1
        chosen = numbers - plan.firsts[documents]
        keys = sample_keys(numbers, 0)
        other_documents = (documents + 1 + keys % max(1, N - 1)) % N
        counts = np.diff(plan.firsts)
        others = (keys >> 32) % counts[other_documents]
        which = np.stack([documents, other_documents])
        n, c, k = plan.lengths[which], counts[which], np.stack([chosen, others])
        begins, ends = k * n // c, (k + 1) * n // c
        lengths = ends - begins
        lengths[1] *= N > 1
        return plan.starts[which] + begins, lengths

    def _plan(self, tar: int) -> _Tar:
        if (known := self._recent.get(tar)) is not None:
            return known
        with_ends = self._split.lengths_of(tar)
        starts = self._split.tar_starts[tar] + np.cumsum(with_ends) - with_ends
        lengths = _text_lengths(with_ends)
        kept = lengths > 1
        counts = self._counts(lengths)[kept]
        plan = _Tar(starts[kept], lengths[kept], np.concatenate([np.zeros(1, np.int64), np.cumsum(counts)]))
        return self._recent.keep(tar, plan)

    def _counts(self, lengths: np.ndarray) -> np.ndarray:
        """Return the number of passages of each document."""
        return np.where(lengths > 1, -(-lengths // self._longest), 0)


def _text_lengths(with_ends: np.ndarray) -> np.ndarray:
    return with_ends.astype(np.int64) - 1
