"""Questions over contexts: each sample is a question with a window of its context; long contexts have several
that overlap.

Dim names: M samples of a micro-batch, T sequence length.
"""

from __future__ import annotations

import numpy as np
import xxhash

from llmtrain.data.datasets.base import EMPTY
from llmtrain.data.datasets.examples import PaddedRows
from llmtrain.labels import IGNORE_INDEX
from llmtrain.tables.table import TableSplit
from llmtrain.tokenizers.base import Frame


class AnswerWindows(PaddedRows):
    """The windows of all rows of a split, in order."""

    def __init__(
        self,
        split: TableSplit,
        spans: np.ndarray,
        sequence_length: int,
        frame: Frame,
        pad_id: int,
        *,
        group: int,
        overlap: int,
    ) -> None:
        """spans: first and last token of each row's answer in its context, int64 (N, 2), −1 for none;
        overlap: tokens of the context that consecutive windows share."""
        self._spans = spans
        self.split, self.sequence_length, self.group = split, sequence_length, group
        self._template, self._pad_id = frame.two, pad_id
        self._first, self._second = (self.split.ragged(name) for name in ("first", "second"))
        specials = self._template.num_specials
        most = max(1, (sequence_length - specials) // 2)
        self._asked = np.minimum(self._first.lengths, most)
        """Tokens kept of each question: no more than half a row."""
        rows, begins, ends = [], [], []
        for row, (asked, context) in enumerate(
            zip(self._asked.tolist(), self._second.lengths.tolist(), strict=True)
        ):
            room = max(1, sequence_length - specials - asked)
            step = max(1, room - min(overlap, room - 1))
            begin = 0
            while True:
                end = min(begin + room, context)
                rows.append(row)
                begins.append(begin)
                ends.append(end)
                if end >= context:
                    break
                begin += step
        self.rows = np.array(rows, np.int64)
        """Row of each window."""
        self.begins, self.ends = np.array(begins, np.int64), np.array(ends, np.int64)
        """First token of the context in each window, and the one behind its last."""
        self.lengths = self._asked[self.rows] + self.ends - self.begins + specials

    @property
    def fingerprint(self) -> str:
        said = f"{self.split.fingerprint}/{self.sequence_length}/{self._template}/{len(self)}"
        return xxhash.xxh3_128_hexdigest(said.encode())

    def describe(self) -> str:
        windows = f"{len(self):,} windows of {self.lengths.mean():.1f} tokens"
        return f"{self.split.describe()}, {windows}"

    def context_at(self, window: int) -> int:
        """Return the position in a window's sequence of its first token of the context."""
        asked = int(self._asked[self.rows[window]])
        return len(self._template.first) + asked + len(self._template.between)

    def get(self, indices: np.ndarray) -> dict[str, np.ndarray]:
        """Return "tokens", "segments" and "lengths" as Examples does; "context" int64 (M, 2), the positions
        [first, end) of the context; and "span" int64 (M, 2), the first and last position of the answer, both
        0 where the window holds none, IGNORE_INDEX for EMPTY samples."""
        M, T = len(indices), self.sequence_length
        tokens = np.full((M, T), self._pad_id, np.int64)
        segments = np.full((M, T), -1, np.int8)
        lengths, context = np.ones(M, np.int64), np.zeros((M, 2), np.int64)
        span = np.full((M, 2), IGNORE_INDEX, np.int64)
        template = self._template
        for sample, window in enumerate(indices.tolist()):
            if window == EMPTY:
                continue
            row, begin, end = int(self.rows[window]), int(self.begins[window]), int(self.ends[window])
            asked = int(self._asked[row])
            parts = [
                (template.first, template.first_segments),
                (self._first[row][:asked], [template.segments[0]] * asked),
                (template.between, template.between_segments),
                (self._second[row][begin:end], [template.segments[1]] * (end - begin)),
                (template.last, template.last_segments),
            ]
            ids = np.concatenate([np.asarray(part, np.int64) for part, _ in parts])
            tokens[sample, : len(ids)] = ids
            segments[sample, : len(ids)] = np.concatenate([np.asarray(part, np.int8) for _, part in parts])
            lengths[sample] = len(ids)
            at = self.context_at(window)
            context[sample] = at, at + end - begin
            first, last = self._spans[row].tolist()
            inside = begin <= first and last < end and first >= 0
            span[sample] = (at + first - begin, at + last - begin) if inside else (0, 0)
        return {"tokens": tokens, "segments": segments, "lengths": lengths, "context": context, "span": span}
