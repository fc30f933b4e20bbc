"""Denoising: a text with noise → the text (BART, arXiv:1910.13461, section 2.2).

Dim names: B rows, M places, N tokens of all rows, K gaps of all rows, G sentences of all rows, V vocabulary.
"""

from __future__ import annotations

import math

import numpy as np

from llmtrain.models.encoder_decoder.config import Seq2SeqConfig
from llmtrain.objectives.draws import choose, uniform, uniform_of_rows
from llmtrain.objectives.seq2seq import OneText, numbers_within

_IS_PERMUTED, _SENTENCE, _GAP_LENGTH, _GAP_PLACE, _ONE_TOKEN, _IS_ROTATED, _ROTATION = range(7)
"""What a hash decides."""


class Denoising(OneText):
    """Sentences in another order, then gaps, masks and omissions, then another beginning; each in the measure
    that the config says.

    Gaps have Poisson's lengths. One of length 0 is a [MASK] where nothing is missing; a row keeps these
    only while its source is no longer than its text.
    """

    def __init__(self, config: Seq2SeqConfig, sentence_ends_V: np.ndarray) -> None:
        """sentence_ends_V: whether each id ends a sentence, bool. Raises ValueError before the vocabulary is
        resolved."""
        super().__init__(config)
        if config.mask_id is None:
            raise ValueError("the special ids are not resolved yet")
        self._mask_id = config.mask_id
        self._sentence_ends_V = sentence_ends_V
        self._lengths_until = _poisson_distribution(config.objective.mean_span)

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
        """Sentences end behind tokens that end one, as three periods or a period and the document's end do,
        and with the row."""
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
        hidden_B = np.floor(sizes_B * self._config.infilling + 0.5).astype(np.int64)
        # Enough for any row but the rarest, which hides a little less: 1.5 times what the mean asks for.
        most_B = (1.5 * hidden_B / self._config.mean_span).astype(np.int64) + 8
        places = np.arange(int(most_B.max(initial=0)))
        drawn_BM = uniform(keys_B, _GAP_LENGTH, places)
        lengths_BM = np.searchsorted(self._lengths_until, drawn_BM, side="right")
        before_BM = np.cumsum(lengths_BM, axis=1) - lengths_BM
        lengths_BM = np.minimum(lengths_BM, hidden_B[:, None] - before_BM)
        is_gap_BM = (before_BM < hidden_B[:, None]) & (places < most_B[:, None])
        grows_B = is_gap_BM.sum(axis=1) > hidden_B
        is_gap_BM &= (lengths_BM > 0) | ~grows_B[:, None]
        gaps_B = is_gap_BM.sum(axis=1)
        lengths_K = lengths_BM[is_gap_BM]
        # Of gaps and tokens that stay, which are gaps: every order is as likely.
        sizes_B = sizes_B - np.where(is_gap_BM, lengths_BM, 0).sum(axis=1) + gaps_B
        is_gap = choose(keys_B, _GAP_PLACE, sizes_B, gaps_B)[_is_token(sizes_B)]
        steps = np.ones(len(is_gap), dtype=np.int64)
        steps[is_gap] = lengths_K
        places = np.minimum(np.cumsum(steps) - steps, max(len(text) - 1, 0))
        return np.where(is_gap, self._mask_id, text[places]), sizes_B

    def _without_tokens(
        self, source: np.ndarray, sizes_B: np.ndarray, keys_B: np.ndarray
    ) -> tuple[np.ndarray, np.ndarray]:
        """Shares are of the text's tokens, of which those in gaps are gone already."""
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
    """Whether each place is within its row, bool (B, M)."""
    return np.arange(int(sizes_B.max(initial=0))) < sizes_B[:, None]


def _poisson_distribution(mean: float) -> np.ndarray:
    """Probability of at most 0, 1, 2, …, up to where the rest is lost in rounding."""
    counts = np.arange(int(mean + 12 * math.sqrt(mean)) + 12)
    logarithms = counts * math.log(mean) - mean - np.array([math.lgamma(n + 1) for n in counts])
    return np.minimum(np.cumsum(np.exp(logarithms)), 1.0)
