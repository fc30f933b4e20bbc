"""Span corruption: text with masked spans → contents of the spans (T5, arXiv:1910.10683, section 3.1.4).

Dim names: B rows, M positions, K spans of all rows.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any, ClassVar, Literal

import numpy as np

from llmtrain.config import require
from llmtrain.errors import Problem
from llmtrain.objectives.draws import choose
from llmtrain.objectives.seq2seq import OneText, OneTextConfig, Widths, numbers_within

if TYPE_CHECKING:
    from llmtrain.corpus.text_source import TextSource

_KEPT, _MASKED = range(2)
"""Purposes of random draws."""


@dataclass(frozen=True)
class SpanCorruptionConfig(OneTextConfig):
    """Predict the contents of masked spans (T5, arXiv:1910.10683)."""

    fills_gaps: ClassVar = True

    kind: Literal["span_corruption"] = "span_corruption"
    share: float = 0.15
    """Share of tokens in masked spans."""
    mean_span: float = 3.0
    """Mean tokens per span."""
    num_sentinels: int = 100
    """Number of sentinel ids, the maximum number of spans per row."""

    def problems(self) -> Iterator[Problem]:
        yield from require(0 < self.share < 1, "share", self.share, "more than 0, less than 1")
        yield from require(1 <= self.mean_span <= 64, "mean_span", self.mean_span, "1 to 64")
        yield from require(self.num_sentinels >= 1, "num_sentinels", self.num_sentinels, "1 or more")

    def widths(self, sequence_length: int) -> Widths:
        """Return the widths for the longest text whose input, with sentinels in place of spans, fits
        sequence_length (section 3.1.4: 568 for 512 at 15 % and 3)."""
        # The input's length grows with the text's.
        texts = np.arange(int(sequence_length / (1 - self.share)) + 4)
        masked, spans = self.spans_of(texts)
        longest = np.searchsorted(texts - masked + spans + 1, sequence_length, side="right")
        return self.widths_of_text(int(longest) - 1)

    def widths_of_text(self, text: int) -> Widths:
        masked, spans = self.spans_of_one(text)
        return Widths(text, text - masked + spans + 1, masked + spans + 1)

    def spans_of(self, lengths: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Return (tokens in spans, spans) for texts of these lengths, int64 of the same shape. A text of
        one token has no span."""
        n = np.asarray(lengths, dtype=np.int64)
        masked = np.clip(np.floor(n * self.share + 0.5).astype(np.int64), 1, np.maximum(n - 1, 1))
        masked = np.where(n > 1, masked, 0)
        spans = np.maximum(np.floor(masked / self.mean_span + 0.5).astype(np.int64), np.minimum(masked, 1))
        # Each span follows a token that stays.
        return masked, np.minimum(spans, n - masked)

    def spans_of_one(self, text: int) -> tuple[int, int]:
        """Return `spans_of` for one text."""
        masked, spans = self.spans_of(np.array(text))
        return int(masked), int(spans)

    def length_problems(self, sequence_length: int, model: Any) -> Iterator[Problem]:
        yield from super().length_problems(sequence_length, model)
        _, spans = self.spans_of_one(self.widths(sequence_length).text)
        yield from require(
            spans <= self.num_sentinels,
            "objective.num_sentinels",
            self.num_sentinels,
            f"{spans} or more, the spans of a row with batch.sequence_length={sequence_length}",
        )

    def _marks(self, model: Any, corpora: TextSource, needed: int) -> tuple[Any, int]:
        """Resolve the sentinels: the tokenizer's if it has enough in T5's order, else the last rows of the
        embedding."""
        count, sentinel_id = self.num_sentinels, model.sentinel_id
        if sentinel_id is None:
            theirs = corpora.sentinel_ids[:count]
            if len(theirs) == count and theirs == tuple(range(theirs[0], theirs[0] - count, -1)):
                sentinel_id = theirs[0]
            else:
                ids = (model.start_id, model.mask_id, model.eos_id)
                needed = max(needed, *(i + 1 for i in ids if i is not None)) + count
                sentinel_id = (model.vocab_size or needed) - 1
        return replace(model, sentinel_id=sentinel_id, num_sentinels=count), needed

    def build(self, model: Any, data: Any, corpora: TextSource | None = None) -> SpanCorruption:
        return SpanCorruption(model, self)


class SpanCorruption(OneText):
    """Mask random spans. A sentinel replaces each in the source and precedes its contents in the target.

    The number of masked tokens and of spans depends only on a text's length, so that full rows have equal
    shapes. Kept and masked pieces alternate, starting with a kept one; all ways to cut the text are
    equally likely.
    """

    def __init__(self, model: Any, config: SpanCorruptionConfig) -> None:
        """Raise ValueError if the model's special ids are not resolved."""
        super().__init__(model, config.widths_of_text)
        if model.sentinel_id is None:
            raise ValueError("the sentinels are not resolved yet")
        self._sentinel_id = model.sentinel_id
        self._config = config

    def corrupt(
        self, text: np.ndarray, lengths_B: np.ndarray, keys_B: np.ndarray
    ) -> tuple[tuple[np.ndarray, np.ndarray], tuple[np.ndarray, np.ndarray]]:
        masked_B, spans_B = self._config.spans_of(lengths_B)
        kept_K = _pieces(keys_B, _KEPT, lengths_B - masked_B, spans_B)
        masked_K = _pieces(keys_B, _MASKED, masked_B, spans_B)
        sentinels_K = self._sentinel_id - numbers_within(spans_B)
        K = len(kept_K)
        pieces = np.stack([kept_K, masked_K], axis=1).reshape(-1)
        is_hidden = np.repeat(np.arange(2 * K) % 2 == 1, pieces)
        first_hidden_K = (np.cumsum(pieces) - pieces)[1::2]
        # The first token of a span is overwritten by its sentinel.
        source = text.copy()
        source[first_hidden_K] = sentinels_K
        stays = ~is_hidden
        stays[first_hidden_K] = True
        target = np.empty(int(masked_K.sum()) + K, dtype=np.int64)
        behind_K = np.cumsum(masked_K + 1)
        target[behind_K - masked_K - 1] = sentinels_K
        is_text = np.ones(len(target), dtype=bool)
        is_text[behind_K - masked_K - 1] = False
        target[is_text] = text[is_hidden]
        return (source[stays], lengths_B - masked_B + spans_B), (target, masked_B + spans_B)


def _pieces(keys_B: np.ndarray, what: int, sizes_B: np.ndarray, counts_B: np.ndarray) -> np.ndarray:
    """Cut sizes_B[b] tokens into counts_B[b] random pieces of at least one token, and return the pieces'
    lengths, row by row, int64 (sum of counts,)."""
    begins_BM = np.zeros((len(sizes_B), int(sizes_B.max(initial=0))), dtype=bool)
    # The first piece begins at 0; the others begin after any token but the last.
    cuts_BM = choose(keys_B, what, np.maximum(sizes_B - 1, 0), np.maximum(counts_B - 1, 0))
    begins_BM[:, 1 : 1 + cuts_BM.shape[1]] = cuts_BM
    begins_BM[:, :1] = (counts_B > 0)[:, None]
    is_token_BM = np.arange(begins_BM.shape[1]) < np.where(counts_B > 0, sizes_B, 0)[:, None]
    begins = begins_BM[is_token_BM]
    return np.diff(np.flatnonzero(begins), append=len(begins))
