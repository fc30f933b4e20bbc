"""Encode long texts in parts, with the same ids as the whole text, in the memory of one part.

Consecutive parts overlap. At the edge of a part ids may differ from those of the whole text, because a word
is cut or the tokenizer adds a space before a text, but no tokenizer looks further than a long word. The
overlap is also encoded alone. Its ids are valid in the context before it where they agree with those of the
part that it ends, and in the context after it where they agree with those of the part that it begins. The
parts are joined where both hold.
"""

from __future__ import annotations

import numpy as np

from llmtrain.tokenizers.base import Tokenizer

OVERLAP = 16
"""An overlap has 1 / OVERLAP of the bytes of a part."""
AGREEING_TOKENS = 8
"""Minimum number of agreeing ids at which two parts are joined."""


def encode_text(tokenizer: Tokenizer, text: bytes, part_bytes: int) -> np.ndarray:
    """Return the ids of UTF-8 `text`, encoded in parts of `part_bytes` (at least some KB). Where the parts
    cannot be joined, as within a very long word, use longer parts."""

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
    """Return the length of the common prefix of two arrays of ids."""
    length = min(len(a), len(b))
    different = np.flatnonzero(a[:length] != b[:length])
    return int(different[0]) if len(different) else length


def _character(text: bytes, offset: int) -> int:
    """Return the last offset up to `offset` at which a UTF-8 character begins, or the length of the text."""
    if offset >= len(text):
        return len(text)
    while text[offset] & 0xC0 == 0x80:
        offset -= 1
    return offset
