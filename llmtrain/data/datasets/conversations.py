"""Conversations of a table, several packed into a row or one in each; what is too long is cut at a turn.

Dim names: M samples of a micro-batch, T sequence length, W = T + 1 tokens of a row, C conversations.
"""

from __future__ import annotations

import numpy as np
import xxhash

from llmtrain.data.datasets.base import EMPTY, PADDING_DOCUMENT
from llmtrain.data.datasets.examples import PaddedRows
from llmtrain.data.datasets.packing import best_fit
from llmtrain.errors import DataError, Problem
from llmtrain.tables.table import TableSplit


class Conversations(PaddedRows):
    """The conversations of one split, one in each row. Each ends with an answer: later ones that do not fit
    are cut off, and conversations whose first does not fit are left out."""

    def __init__(self, split: TableSplit, sequence_length: int, *, group: int = 64) -> None:
        """group: see OrdersByLength. Raise DataError if no answer fits."""
        self.split, self.sequence_length, self.group = split, sequence_length, group
        self._tokens, self._trained = split.ragged("tokens"), split.ragged("trained")
        ends = split.ragged("answers")
        kept, cut = np.zeros(len(split), np.int64), 0
        for row in range(len(split)):
            of_row = ends[row]
            fitting = of_row[of_row <= sequence_length + 1]
            # The first token of a row has nothing before it from which it could be predicted.
            if len(fitting) and self._trained[row][1 : fitting[-1]].any():
                kept[row] = fitting[-1]
                cut += len(fitting) < len(of_row)
        self._rows = np.flatnonzero(kept)
        """Row of the table of each conversation, (C,)."""
        self._kept = kept[self._rows]
        # Of each conversation those that are predicted from or predicted.
        self.lengths = np.minimum(self._kept, sequence_length)
        self.cut, self.left_out = cut, len(split) - len(self._rows)
        """Conversations that are cut, and those that are left out."""
        if not len(self._rows):
            shortest = min(int(ends[row][0]) for row in range(len(split)))
            got = f"no conversation of {len(split):,} whose first answer ends within {sequence_length} tokens"
            allowed = f"{shortest - 1} or more, the shortest one"
            raise DataError(Problem(f"batch.sequence_length ({split.name})", got, allowed))

    @property
    def fingerprint(self) -> str:
        said = f"{self.split.fingerprint}/{self.sequence_length}/{type(self).__name__}"
        return xxhash.xxh3_128_hexdigest(said.encode())

    def describe(self) -> str:
        tokens = int(self._kept.sum())
        trained = sum(
            int(self._trained[row][:kept].sum())
            for row, kept in zip(self._rows.tolist(), self._kept.tolist(), strict=True)
        )
        said = [f"{self.split.name}: {len(self.split):,} conversations"]
        said.append(f"{tokens:,} tokens, {trained / tokens:.1%} of them trained")
        if self.cut:
            said.append(f"cut {self.cut:,} at a turn to fit {self.sequence_length} tokens")
        if self.left_out:
            said.append(f"left out {self.left_out:,} whose first answer does not fit")
        return ", ".join(said)

    def get(self, indices: np.ndarray) -> dict[str, np.ndarray]:
        """Return "tokens" int64 (M, W), 0 at padding; "documents" int32 (M, W), the number of each token's
        conversation within the row, PADDING_DOCUMENT at padding; and "contexts" bool (M, W), True at tokens
        that are not trained."""
        M, W = len(indices), self.sequence_length + 1
        tokens = np.zeros((M, W), np.int64)
        documents = np.full((M, W), PADDING_DOCUMENT, np.int32)
        contexts = np.ones((M, W), bool)
        for sample, index in enumerate(indices.tolist()):
            if index == EMPTY:
                continue
            at = 0
            for number, conversation in enumerate(self._of_row(index)):
                row, kept = int(self._rows[conversation]), int(self._kept[conversation])
                here = slice(at, at + kept)
                tokens[sample, here] = self._tokens[row][:kept]
                contexts[sample, here] = ~self._trained[row][:kept].astype(bool)
                documents[sample, here] = number
                at += kept
        return {"tokens": tokens, "documents": documents, "contexts": contexts}

    @property
    def single(self) -> Conversations:
        """The conversations, one by one."""
        return self

    def last_answer(self, number: int) -> tuple[np.ndarray, np.ndarray]:
        """Return the ids of all that comes before the last answer of a conversation, and those of the answer,
        with the token that ends it; int64."""
        row, kept = int(self._rows[number]), int(self._kept[number])
        tokens = self._tokens[row][:kept].astype(np.int64)
        others = np.flatnonzero(~self._trained[row][:kept].astype(bool))
        start = int(others[-1]) + 1 if len(others) else 0
        return tokens[:start], tokens[start:]

    def where(self, index: int) -> list[tuple[str, int, int]]:
        """Return (split, row of the table, tokens) for each conversation of a sample."""
        found = self._of_row(index)
        return [(self.split.name, int(self._rows[number]), int(self._kept[number])) for number in found]

    def _of_row(self, index: int) -> list[int]:
        """Return the numbers of the conversations of a row."""
        return [index]


class PackedConversations:
    """Conversations in rows of one width, several in each, by best fit (packing.py)."""

    def __init__(self, split: TableSplit, sequence_length: int) -> None:
        """Raise DataError if no answer fits."""
        self._single = _Packed(split, sequence_length)
        self.sequence_length = sequence_length

    @property
    def single(self) -> Conversations:
        """The conversations, one by one."""
        return self._single

    @property
    def split(self) -> TableSplit:
        return self._single.split

    @property
    def fingerprint(self) -> str:
        return self._single.fingerprint

    @property
    def tar_sizes(self) -> np.ndarray:
        return np.array([len(self)])

    @property
    def padding(self) -> float:
        """Share of positions that are padding."""
        return 1.0 - self._single.tokens / (len(self) * (self.sequence_length + 1))

    def __len__(self) -> int:
        return len(self._single.plan)

    def describe(self) -> str:
        rows = f"in {len(self):,} sequences of {self.sequence_length}, {self.padding:.1%} padding"
        return f"{self._single.describe()}, {rows}"

    def get(self, indices: np.ndarray) -> dict[str, np.ndarray]:
        """Return what Conversations does."""
        return self._single.get(indices)

    def where(self, index: int) -> list[tuple[str, int, int]]:
        """Return (split, row of the table, tokens) for each conversation of a sample."""
        return self._single.where(index)


class _Packed(Conversations):
    """What fills the rows of PackedConversations, which have no lengths of their own to be ordered by."""

    def __init__(self, split: TableSplit, sequence_length: int) -> None:
        super().__init__(split, sequence_length)
        self.plan = best_fit(self._kept, sequence_length + 1)
        self.tokens = int(self._kept.sum())
        ends = np.cumsum(self._kept)
        self._numbers = np.searchsorted(ends, self.plan.starts, side="right")

    def _of_row(self, index: int) -> list[int]:
        first, last = self.plan.first_piece[index : index + 2]
        found: list[int] = self._numbers[first:last].tolist()
        return found
