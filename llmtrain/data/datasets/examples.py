"""Rows of a table as a model reads them: one text or two, with the special tokens of its family around them.

Dim names: M samples of a micro-batch, T sequence length.
"""

from __future__ import annotations

import numpy as np
import xxhash

from llmtrain.data.datasets.base import EMPTY
from llmtrain.labels import IGNORE_INDEX
from llmtrain.tables.table import TableSplit
from llmtrain.tokenizers.base import Frame, Template


def padded_width(longest: int) -> int:
    """Return the width of a batch for the tokens of its longest row: rounded up to a multiple of 8, which
    GPUs want, or of less where that would be more than a sixteenth."""
    step = 1 if longest < 32 else 2 if longest < 64 else 4 if longest < 128 else 8
    return -(-longest // step) * step


class PaddedRows:
    """Base of datasets whose batches are as wide as their longest sample (see OrdersByLength)."""

    lengths: np.ndarray
    """Tokens of each sample, int64 (N,)."""

    @property
    def tar_sizes(self) -> np.ndarray:
        return np.array([len(self)])

    def __len__(self) -> int:
        return len(self.lengths)

    def batch_tokens(self, rows: np.ndarray) -> int:
        return len(rows) * padded_width(int(self.lengths[rows].max()))


class CutRows(PaddedRows):
    """Base of datasets with a sample for each row of a table, cut to a maximum length."""

    split: TableSplit
    sequence_length: int
    """Tokens of the longest row."""
    truncated: int
    """Rows that are cut."""

    def describe(self) -> str:
        cut = f", {self.truncated:,} cut to {self.sequence_length} tokens" if self.truncated else ""
        return f"{self.split.describe()}, {self.lengths.mean():.1f} tokens a row{cut}"


class Examples(CutRows):
    """The rows of one split, each in one sequence; what is too long is cut."""

    def __init__(
        self, split: TableSplit, sequence_length: int, frame: Frame, pad_id: int, group: int = 64
    ) -> None:
        """frame: special tokens around texts; group: see OrdersByLength."""
        self.split, self.sequence_length, self.frame = split, sequence_length, frame
        self.group = group
        self._pad_id = pad_id
        first = split.ragged("first")
        second = split.ragged("second") if "second" in split.columns else None
        self._first, self._second = first, second
        self.template: Template = frame.one if second is None else frame.two
        room = max(0, sequence_length - self.template.num_specials)
        both = first.lengths if second is None else first.lengths + second.lengths
        self.truncated = int((both > room).sum())
        self.lengths = np.minimum(both, room) + self.template.num_specials

    @property
    def fingerprint(self) -> str:
        said = f"{self.split.fingerprint}/{self.sequence_length}/{self.frame}"
        return xxhash.xxh3_128_hexdigest(said.encode())

    def get(self, indices: np.ndarray) -> dict[str, np.ndarray]:
        """Return "tokens" int64 (M, T), padded; "segments" int8 (M, T), -1 at padding; "lengths" int64 (M), 1
        for EMPTY samples; and the columns of numbers, IGNORE_INDEX or NaN for EMPTY samples."""
        M, T = len(indices), self.sequence_length
        tokens = np.full((M, T), self._pad_id, np.int64)
        segments = np.full((M, T), -1, np.int8)
        lengths = np.ones(M, np.int64)
        for row, index in enumerate(indices.tolist()):
            if index == EMPTY:
                continue
            ids, of_ids = self._row(index)
            lengths[row] = len(ids)
            tokens[row, : len(ids)] = ids
            segments[row, : len(ids)] = of_ids
        raw: dict[str, np.ndarray] = {"tokens": tokens, "segments": segments, "lengths": lengths}
        for name, column in self.split.columns.items():
            if isinstance(column, np.ndarray):
                raw[name] = _labels(column, indices)
        return raw

    def text_positions(self, index: int) -> tuple[int, int]:
        """Return the position of the first token of the first text, and how many of its tokens are kept."""
        return len(self.template.first), self._kept(index)[0]

    def _kept(self, index: int) -> tuple[int, int]:
        """Return how many tokens of each text are kept: of a pair, the longer one is cut first."""
        room = max(0, self.sequence_length - self.template.num_specials)
        a = self._first.length(index)
        if self._second is None:
            return min(a, room), 0
        b = self._second.length(index)
        over = a + b - room
        if over <= 0:
            return a, b
        # Cut the longer one down to the other, then both in turn.
        cut_of_longer = min(over, abs(a - b))
        if a > b:
            a -= cut_of_longer
        else:
            b -= cut_of_longer
        over -= cut_of_longer
        return a - over // 2, b - (over - over // 2)

    def _row(self, index: int) -> tuple[np.ndarray, np.ndarray]:
        """Return ids and segments of a row."""
        template = self.template
        a, b = self._kept(index)
        of_first, of_second = template.segments
        ids = [np.array(template.first, np.int64), self._first[index][:a]]
        segments = [np.array(template.first_segments, np.int8), np.full(a, of_first, np.int8)]
        if self._second is not None:
            ids += [np.array(template.between, np.int64), self._second[index][:b]]
            segments += [np.array(template.between_segments, np.int8), np.full(b, of_second, np.int8)]
        ids.append(np.array(template.last, np.int64))
        segments.append(np.array(template.last_segments, np.int8))
        return np.concatenate(ids), np.concatenate(segments)


class TaggedExamples(Examples):
    """Rows of words with a tag each."""

    def get(self, indices: np.ndarray) -> dict[str, np.ndarray]:
        """Return in addition "tag_labels" int64 (M, T): the tag at the first token of each word, IGNORE_INDEX
        elsewhere."""
        raw = super().get(indices)
        starts, tags = self.split.ragged("word_starts"), self.split.ragged("tags")
        labels = np.full(raw["tokens"].shape, IGNORE_INDEX, np.int64)
        for row, index in enumerate(indices.tolist()):
            if index != EMPTY:
                first, kept = self.text_positions(index)
                begins = starts[index]
                seen = begins < kept
                labels[row, first + begins[seen]] = tags[index][seen]
        return {**raw, "tag_labels": labels}


def _labels(column: np.ndarray, indices: np.ndarray) -> np.ndarray:
    values = np.array(column[np.maximum(indices, 0)])
    values[indices == EMPTY] = np.nan if values.dtype.kind == "f" else IGNORE_INDEX
    return values
