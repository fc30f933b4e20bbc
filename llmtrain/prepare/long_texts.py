"""Ids of texts too long to be encoded at once: those of the whole text, in the memory of a part of it.

Consecutive parts overlap. What stands at the edge of a part may change its ids there, be it a cut word or the
space that some tokenizers put before a text, but no tokenizer looks further than a long word. An overlap is
encoded alone as well: its ids know what stands before where they agree with the part that it ends, and what
follows where they agree with the part that it begins. Where both hold, the parts are joined.
"""

from __future__ import annotations

import numpy as np

from llmtrain.tokenizers.base import Tokenizer

OVERLAP = 16
"""An overlap has this fraction of a part's bytes."""
AGREEING_TOKENS = 8
"""Least ids on which a join rests."""


def encode_text(tokenizer: Tokenizer, text: bytes, part_bytes: int) -> np.ndarray:
    """Ids of UTF-8 `text`, encoded in parts of `part_bytes`, some KB at least, and in longer ones where parts
    of this length do not join, as within a word without end."""

    def encode(start: int, stop: int) -> np.ndarray:
        return tokenizer.encode_arrays([text[start:stop]])[0]

    joined: list[np.ndarray] = []
    start, stop, skipped = 0, _character(text, part_bytes), 0
    ids = encode(start, stop)
    while stop < len(text):
        size = stop - start
        overlap = _character(text, stop - size // OVERLAP)
        between = encode(overlap, stop)
        next_stop = _character(text, overlap + max(part_bytes, 2 * (stop - overlap)))
        following = encode(overlap, next_stop)
        first = len(between) - _num_equal(ids[::-1], between[::-1])
        last = _num_equal(between, following)
        if last - first >= AGREEING_TOKENS:
            join = (first + last) // 2
            joined.append(ids[: len(ids) - (len(between) - join)])
            start, stop, skipped, ids = overlap, next_stop, join, following[join:]
        else:
            stop = _character(text, start + 2 * size)
            ids = encode(start, stop)[skipped:]
    return np.concatenate([*joined, ids])


def _num_equal(a: np.ndarray, b: np.ndarray) -> int:
    """With how many equal ids both begin."""
    length = min(len(a), len(b))
    different = np.flatnonzero(a[:length] != b[:length])
    return int(different[0]) if len(different) else length


def _character(text: bytes, place: int) -> int:
    """The last place up to `place` at which a character begins, or the end."""
    if place >= len(text):
        return len(text)
    while text[place] & 0xC0 == 0x80:
        place -= 1
    return place
