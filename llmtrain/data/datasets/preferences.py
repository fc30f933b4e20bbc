"""Pairs of answers to one prompt, the chosen one and the rejected, each whole or not at all.

Dim names: M samples of a micro-batch, T sequence length, W = T + 1 tokens of a row.
"""

from __future__ import annotations

import numpy as np
import xxhash

from llmtrain.data.datasets.base import EMPTY, PADDING_DOCUMENT
from llmtrain.data.datasets.examples import padded_width
from llmtrain.errors import DataError, Problem
from llmtrain.tables.table import TableSplit

SIDES = ("chosen", "rejected")


class Preferences:
    """The pairs of one split; those with an answer that does not fit are left out."""

    def __init__(self, split: TableSplit, sequence_length: int, *, group: int = 64) -> None:
        """group: see OrdersByLength. Raise DataError if no pair fits."""
        self.split, self.sequence_length, self.group = split, sequence_length, group
        self._tokens = {side: split.ragged(f"{side}_tokens") for side in SIDES}
        self._trained = {side: split.ragged(f"{side}_trained") for side in SIDES}
        ends = [split.ragged(f"{side}_answers") for side in SIDES]
        last = np.array([[of_side[row][-1] for of_side in ends] for row in range(len(split))], np.int64)
        longest = last.max(axis=1)
        self.rows = np.flatnonzero(longest <= sequence_length + 1)
        """Row of the table of each pair."""
        if not len(self.rows):
            got = f"no pair of {len(split):,} whose answers end within {sequence_length} tokens"
            allowed = f"{int(longest.min()) - 1} or more, the shortest pair"
            raise DataError(Problem(f"batch.sequence_length ({split.name})", got, allowed))
        self._ends = last[self.rows]
        """Token after the last of each answer, int64 (pairs, 2)."""

    @property
    def fingerprint(self) -> str:
        said = f"{self.split.fingerprint}/{self.sequence_length}/{type(self).__name__}"
        return xxhash.xxh3_128_hexdigest(said.encode())

    @property
    def lengths(self) -> np.ndarray:
        """Tokens of both answers of each pair, with their prompts, int64."""
        return np.minimum(self._ends, self.sequence_length).sum(axis=1)

    @property
    def tar_sizes(self) -> np.ndarray:
        return np.array([len(self)])

    def __len__(self) -> int:
        return len(self.rows)

    def batch_tokens(self, rows: np.ndarray) -> int:
        longest = min(int(self._ends[rows].max()), self.sequence_length)
        return 2 * len(rows) * padded_width(longest)

    def describe(self) -> str:
        said = f"{self.split.name}: {len(self.split):,} pairs, {self._ends.mean():.1f} tokens an answer"
        without = len(self.split) - len(self)
        return said + (f", left out {without:,} with an answer that does not fit" if without else "")

    def get(self, indices: np.ndarray) -> dict[str, np.ndarray]:
        """Return "tokens" int64 (M, 2, W), the chosen answer first, 0 at padding; "documents" int32
        (M, 2, W), 0, or PADDING_DOCUMENT at padding; "contexts" bool (M, 2, W), True at tokens that are no
        answer; and "rows" int64 (M), the index, EMPTY in samples that are."""
        M, W = len(indices), self.sequence_length + 1
        tokens = np.zeros((M, 2, W), np.int64)
        documents = np.full((M, 2, W), PADDING_DOCUMENT, np.int32)
        contexts = np.ones((M, 2, W), bool)
        for sample, index in enumerate(indices.tolist()):
            if index == EMPTY:
                continue
            row = int(self.rows[index])
            for place, side in enumerate(SIDES):
                end = int(self._ends[index, place])
                tokens[sample, place, :end] = self._tokens[side][row][:end]
                contexts[sample, place, :end] = ~self._trained[side][row][:end].astype(bool)
                documents[sample, place, :end] = 0
        rows = np.array(indices, np.int64)
        return {"tokens": tokens, "documents": documents, "contexts": contexts, "rows": rows}

    def where(self, index: int) -> list[tuple[str, int, int]]:
        """Return (split, row of the table, tokens) for each answer of a pair."""
        row = int(self.rows[index])
        return [(self.split.name, row, int(end)) for end in self._ends[index]]
