"""Denoising: corrupted text → original text (BART, arXiv:1910.13461, section 2.2).

Dim names: B rows, M positions, N tokens of all rows, K spans of all rows, G sentences of all rows, V
vocabulary.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any, Literal

import numpy as np

from llmtrain.config import require
from llmtrain.errors import Problem
from llmtrain.objectives.draws import choose, uniform, uniform_of_rows
from llmtrain.objectives.seq2seq import OneText, OneTextConfig, Widths, numbers_within

if TYPE_CHECKING:
    from llmtrain.corpus.text_source import TextSource

_IS_PERMUTED, _SENTENCE, _SPAN_LENGTH, _SPAN_POSITION, _ONE_TOKEN, _IS_ROTATED, _ROTATION = range(7)
"""Purposes of random draws."""


@dataclass(frozen=True)
class DenoisingConfig(OneTextConfig):
    """Reconstruct a text from a corrupted copy (BART, arXiv:1910.13461)."""

    kind: Literal["denoising"] = "denoising"
    infilling: float = 0.3
    """Share of tokens in spans that are each replaced by one [MASK]; span lengths are Poisson distributed,
    including 0."""
    mean_span: float = 3.0
    """Mean tokens per span."""
    masking: float = 0.0
    """Share of tokens that are each replaced by [MASK]."""
    deletion: float = 0.0
    """Share of tokens that are deleted."""
    permutation: float = 1.0
    """Share of rows whose sentences are permuted."""
    rotation: float = 0.0
    """Share of rows that are rotated to start at a random token."""

    def problems(self) -> Iterator[Problem]:
        for name in ("infilling", "masking", "deletion", "permutation", "rotation"):
            yield from require(0 <= getattr(self, name) <= 1, name, getattr(self, name), "0 to 1")
        yield from require(1 <= self.mean_span <= 64, "mean_span", self.mean_span, "1 to 64")
        noise = self.infilling + self.masking + self.deletion
        yield from require(noise < 1, "infilling", f"{noise:g} with masking and deletion", "less than 1")
        asks = noise > 0 or self.permutation > 0 or self.rotation > 0
        yield from require(asks, "infilling", 0, "some kind of noise above 0")

    def widths(self, sequence_length: int) -> Widths:
        """Return widths with one token less of text, to leave room for the end token."""
        return self.widths_of_text(sequence_length - 1)

    def widths_of_text(self, text: int) -> Widths:
        return Widths(text, text + 1, text + 1)

    def _marks(self, model: Any, corpora: TextSource, needed: int) -> tuple[Any, int]:
        if model.mask_id is not None:
            return model, needed
        mask_id = corpora.special_ids.get("mask", needed)
        return replace(model, mask_id=mask_id), max(needed, mask_id + 1)

    def build(self, model: Any, data: Any, corpora: TextSource | None = None) -> Denoising:
        assert corpora is not None
        return Denoising(model, self, corpora.load_tokenizer().sentence_ends())


class Denoising(OneText):
    """Permute sentences, then infill, mask and delete tokens, then rotate, each as often as the config says.

    Span lengths are Poisson distributed. A span of length 0 inserts a [MASK]; a row keeps such spans only
    while its source is no longer than its text.
    """

    def __init__(self, model: Any, config: DenoisingConfig, sentence_ends_V: np.ndarray) -> None:
        """sentence_ends_V: True for ids that end a sentence. Raise ValueError if the model's special ids
        are not resolved."""
        super().__init__(model, config.widths_of_text)
        if model.mask_id is None:
            raise ValueError("the special ids are not resolved yet")
        self._config = config
        self._mask_id = model.mask_id
        self._sentence_ends_V = sentence_ends_V
        self._lengths_until = _poisson_distribution(config.mean_span)

    def corrupt(
        self, text: np.ndarray, lengths_B: np.ndarray, keys_B: np.ndarray
    ) -> tuple[tuple[np.ndarray, np.ndarray], tuple[np.ndarray, np.ndarray]]:
        config = self._config
        source, sizes_B = text, lengths_B
        if config.permutation > 0:
            source = self._permuted(source, sizes_B, keys_B)
        if config.infilling > 0:
            source, sizes_B = self._infilled(source, sizes_B, keys_B)
        if config.masking > 0 or config.deletion > 0:
            source, sizes_B = self._without_tokens(source, sizes_B, keys_B)
        if config.rotation > 0:
            source = self._rotated(source, sizes_B, keys_B)
        return (source, sizes_B), (text, lengths_B)

    def _permuted(self, text: np.ndarray, sizes_B: np.ndarray, keys_B: np.ndarray) -> np.ndarray:
        """Permute the sentences of some rows. A sentence ends after a token that ends one (consecutive
        ones, such as three periods, count once) and at the end of the row."""
        ends = self._sentence_ends_V[text]
        ends[:-1] &= ~ends[1:]
        ends[np.cumsum(sizes_B)[sizes_B > 0] - 1] = True
        sentence_ends_G = np.flatnonzero(ends) + 1
        lengths_G = np.diff(sentence_ends_G, prepend=0)
        rows_N = np.repeat(np.arange(len(sizes_B)), sizes_B)
        rows_G = rows_N[sentence_ends_G - 1]
        counts_B = np.bincount(rows_G, minlength=len(sizes_B))
        is_first_BM = np.arange(int(counts_B.max(initial=0))) < counts_B[:, None]
        drawn_BM = uniform(keys_B, _SENTENCE, np.arange(is_first_BM.shape[1]))
        stays_B = uniform_of_rows(keys_B, _IS_PERMUTED) >= self._config.permutation
        drawn_BM[stays_B] = np.arange(is_first_BM.shape[1])
        order_G = np.lexsort((drawn_BM[is_first_BM], rows_G))
        ordered_G = lengths_G[order_G]
        return text[np.repeat((sentence_ends_G - lengths_G)[order_G], ordered_G) + numbers_within(ordered_G)]

    def _infilled(
        self, text: np.ndarray, sizes_B: np.ndarray, keys_B: np.ndarray
    ) -> tuple[np.ndarray, np.ndarray]:
        masked_B = np.floor(sizes_B * self._config.infilling + 0.5).astype(np.int64)
        # 1.5 times the expected number of spans; very rarely a row needs more and then masks slightly less.
        most_B = (1.5 * masked_B / self._config.mean_span).astype(np.int64) + 8
        positions = np.arange(int(most_B.max(initial=0)))
        drawn_BM = uniform(keys_B, _SPAN_LENGTH, positions)
        lengths_BM = np.searchsorted(self._lengths_until, drawn_BM, side="right")
        before_BM = np.cumsum(lengths_BM, axis=1) - lengths_BM
        lengths_BM = np.minimum(lengths_BM, masked_B[:, None] - before_BM)
        is_span_BM = (before_BM < masked_B[:, None]) & (positions < most_B[:, None])
        grows_B = is_span_BM.sum(axis=1) > masked_B
        is_span_BM &= (lengths_BM > 0) | ~grows_B[:, None]
        spans_B = is_span_BM.sum(axis=1)
        lengths_K = lengths_BM[is_span_BM]
        # All orders of spans and kept tokens are equally likely.
        sizes_B = sizes_B - np.where(is_span_BM, lengths_BM, 0).sum(axis=1) + spans_B
        is_span = choose(keys_B, _SPAN_POSITION, sizes_B, spans_B)[_is_token(sizes_B)]
        steps = np.ones(len(is_span), dtype=np.int64)
        steps[is_span] = lengths_K
        positions = np.minimum(np.cumsum(steps) - steps, max(len(text) - 1, 0))
        return np.where(is_span, self._mask_id, text[positions]), sizes_B

    def _without_tokens(
        self, source: np.ndarray, sizes_B: np.ndarray, keys_B: np.ndarray
    ) -> tuple[np.ndarray, np.ndarray]:
        """Delete tokens. Shares refer to the original text, whose masked spans are already gone."""
        config = self._config
        is_token_BM = _is_token(sizes_B)
        drawn_BM = uniform(keys_B, _ONE_TOKEN, np.arange(is_token_BM.shape[1])) * (1 - config.infilling)
        drawn = np.where(source == self._mask_id, 1.0, drawn_BM[is_token_BM])
        source = np.where(drawn < config.masking, self._mask_id, source)
        stays = (drawn < config.masking) | (drawn >= config.masking + config.deletion)
        stays_BM = np.zeros(is_token_BM.shape, dtype=bool)
        stays_BM[is_token_BM] = stays
        return source[stays], stays_BM.sum(axis=1)

    def _rotated(self, source: np.ndarray, sizes_B: np.ndarray, keys_B: np.ndarray) -> np.ndarray:
        is_rotated_B = uniform_of_rows(keys_B, _IS_ROTATED) < self._config.rotation
        shifts_B = np.floor(uniform_of_rows(keys_B, _ROTATION) * sizes_B).astype(np.int64) * is_rotated_B
        shifted = numbers_within(sizes_B) + np.repeat(shifts_B, sizes_B)
        sizes = np.repeat(sizes_B, sizes_B)
        shifted = np.where(shifted >= sizes, shifted - sizes, shifted)
        return source[np.repeat(np.cumsum(sizes_B) - sizes_B, sizes_B) + shifted]


def _is_token(sizes_B: np.ndarray) -> np.ndarray:
    """Return whether each position is within its row, bool (B, M)."""
    return np.arange(int(sizes_B.max(initial=0))) < sizes_B[:, None]


def _poisson_distribution(mean: float) -> np.ndarray:
    """Return the probabilities of at most 0, 1, 2, …, until the rest is below rounding."""
    counts = np.arange(int(mean + 12 * math.sqrt(mean)) + 12)
    logarithms = counts * math.log(mean) - mean - np.array([math.lgamma(n + 1) for n in counts])
    return np.minimum(np.cumsum(np.exp(logarithms)), 1.0)
