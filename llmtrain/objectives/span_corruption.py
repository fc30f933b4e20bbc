"""Span corruption: a text with gaps → what was in them (T5, arXiv:1910.10683, section 3.1.4).

Dim names: B rows, M places, K gaps of all rows.
"""

from __future__ import annotations

import numpy as np

from llmtrain.models.encoder_decoder.config import Seq2SeqConfig
from llmtrain.objectives.draws import choose
from llmtrain.objectives.seq2seq import OneText, numbers_within

_KEPT, _HIDDEN = range(2)
"""What a hash decides."""


class SpanCorruption(OneText):
    """Gaps of random lengths at random places; a sentinel stands for each in the source, and before what was
    in it in the target.

    How many tokens and gaps there are depends on a text's length alone, so that full rows are alike.
    The text is cut into as many pieces that stay as pieces that go, in turn, the first stays; every way
    of cutting is as likely.
    """

    def __init__(self, config: Seq2SeqConfig) -> None:
        """Raises ValueError before the vocabulary is resolved."""
        super().__init__(config)
        if config.sentinel_id is None:
            raise ValueError("the sentinels are not resolved yet")
        self._sentinel_id = config.sentinel_id

    def corrupt(
        self, text: np.ndarray, lengths_B: np.ndarray, keys_B: np.ndarray
    ) -> tuple[tuple[np.ndarray, np.ndarray], tuple[np.ndarray, np.ndarray]]:
        hidden_B, gaps_B = self._config.gaps_of(lengths_B)
        kept_K = _pieces(keys_B, _KEPT, lengths_B - hidden_B, gaps_B)
        hidden_K = _pieces(keys_B, _HIDDEN, hidden_B, gaps_B)
        sentinels_K = self._sentinel_id - numbers_within(gaps_B)
        K = len(kept_K)
        pieces = np.stack([kept_K, hidden_K], axis=1).reshape(-1)
        is_hidden = np.repeat(np.arange(2 * K) % 2 == 1, pieces)
        first_hidden_K = (np.cumsum(pieces) - pieces)[1::2]
        # A gap's first token makes room for its sentinel.
        source = text.copy()
        source[first_hidden_K] = sentinels_K
        stays = ~is_hidden
        stays[first_hidden_K] = True
        target = np.empty(int(hidden_K.sum()) + K, dtype=np.int64)
        behind_K = np.cumsum(hidden_K + 1)
        target[behind_K - hidden_K - 1] = sentinels_K
        is_text = np.ones(len(target), dtype=bool)
        is_text[behind_K - hidden_K - 1] = False
        target[is_text] = text[is_hidden]
        return (source[stays], lengths_B - hidden_B + gaps_B), (target, hidden_B + gaps_B)


def _pieces(keys_B: np.ndarray, what: int, sizes_B: np.ndarray, counts_B: np.ndarray) -> np.ndarray:
    """Lengths of counts_B[b] pieces that sizes_B[b] tokens are cut into, each one or more, row by row, int64
    (sum of counts,)."""
    begins_BM = np.zeros((len(sizes_B), int(sizes_B.max(initial=0))), dtype=bool)
    # The first begins anyway; the others behind any of the tokens but the last.
    cuts_BM = choose(keys_B, what, np.maximum(sizes_B - 1, 0), np.maximum(counts_B - 1, 0))
    begins_BM[:, 1 : 1 + cuts_BM.shape[1]] = cuts_BM
    begins_BM[:, :1] = (counts_B > 0)[:, None]
    is_token_BM = np.arange(begins_BM.shape[1]) < np.where(counts_B > 0, sizes_B, 0)[:, None]
    begins = begins_BM[is_token_BM]
    return np.diff(np.flatnonzero(begins), append=len(begins))
