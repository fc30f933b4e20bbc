"""Character n-grams of words, hashed into buckets (Bojanowski et al. 2017, arXiv:1607.04606)."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

FNV_START, FNV_PRIME = 2166136261, 16777619
_MASK = 0xFFFFFFFF


def hash_of(gram: bytes) -> int:
    """Return fastText's hash: FNV-1a over 32 bits, in which bytes are signed numbers."""
    value = FNV_START
    for byte in gram:
        signed = byte if byte < 128 else byte | 0xFFFFFF00
        value = ((value ^ signed) * FNV_PRIME) & _MASK
    return value


def grams_of(word: str, shortest: int, longest: int) -> list[str]:
    """Return the n-grams of `<word>` with `shortest` to `longest` characters, in fastText's order; single
    marks of the beginning and the end are none."""
    marked = f"<{word}>"
    found = []
    for start in range(len(marked)):
        for length in range(1, longest + 1):
            stop = start + length
            if stop > len(marked):
                break
            if length >= shortest and not (length == 1 and (start == 0 or stop == len(marked))):
                found.append(marked[start:stop])
    return found


def buckets_of(word: str, shortest: int, longest: int, buckets: int) -> list[int]:
    """Return the bucket of each n-gram of a word; none without buckets."""
    if not buckets:
        return []
    return [hash_of(gram.encode()) % buckets for gram in grams_of(word, shortest, longest)]


def bucket_table(
    words: Sequence[str], shortest: int, longest: int, buckets: int
) -> tuple[np.ndarray, np.ndarray]:
    """Return the buckets of all words, one word behind the other, int32, and where each word's begin, int64
    with one more at the end."""
    lists = [buckets_of(word, shortest, longest, buckets) for word in words]
    starts = np.zeros(len(words) + 1, np.int64)
    np.cumsum([len(each) for each in lists], out=starts[1:])
    flat = np.fromiter((bucket for each in lists for bucket in each), np.int32, int(starts[-1]))
    return flat, starts


@dataclass(frozen=True)
class Subwords:
    """The vectors of n-grams, from which words that were never seen get theirs."""

    matrix: np.ndarray
    """(buckets, dimensions) float32."""
    shortest: int
    longest: int

    def buckets_of(self, word: str) -> list[int]:
        return buckets_of(word, self.shortest, self.longest, len(self.matrix))

    def vector(self, word: str) -> np.ndarray | None:
        """Return the mean of the vectors of the word's n-grams, (dimensions,); None if it has none."""
        rows = self.buckets_of(word)
        if not rows:
            return None
        return np.asarray(self.matrix[rows], dtype=np.float32).mean(axis=0)
