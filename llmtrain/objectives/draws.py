"""Random draws that depend only on a sample's key, not on the batch or process that reads it.

Dim names: B rows, M positions.
"""

from __future__ import annotations

import numpy as np

from llmtrain.hashing import mix

_GOLDEN_GAMMA = np.uint64(0x9E3779B97F4A7C15)
_PLACE_BITS = np.uint64(24)


def words(keys_B: np.ndarray, what: int, positions: np.ndarray) -> np.ndarray:
    """Return uniform uint64 numbers, (B, M), for positions (M,) or (B, M) below 2^40. what: the purpose of
    the draw; draws for different purposes are independent."""
    salted = mix((positions.astype(np.uint64) + np.uint64(what << 40)) * _GOLDEN_GAMMA)
    return mix(keys_B.astype(np.uint64)[:, None] + salted)


def uniform(keys_B: np.ndarray, what: int, positions: np.ndarray) -> np.ndarray:
    """Return numbers in [0, 1), float64 (B, M); arguments as for `words`."""
    return (words(keys_B, what, positions) >> np.uint64(11)) * 2.0**-53


def uniform_of_rows(keys_B: np.ndarray, what: int) -> np.ndarray:
    """Return a number in [0, 1) for each row, float64 (B,)."""
    return uniform(keys_B, what, np.zeros(1))[:, 0]


def choose(keys_B: np.ndarray, what: int, sizes_B: np.ndarray, counts_B: np.ndarray) -> np.ndarray:
    """Return counts_B[b] random positions below sizes_B[b], all sets equally likely: bool (B, M), where M
    is the largest size."""
    M = int(sizes_B.max(initial=0))
    if M == 0 or int(counts_B.max()) == 0:
        return np.zeros((len(keys_B), M), dtype=bool)
    places_M = np.arange(M, dtype=np.uint64)
    # The position in the low bits makes all numbers of a row distinct.
    drawn_BM = ((words(keys_B, what, places_M) >> _PLACE_BITS) << _PLACE_BITS) | places_M
    drawn_BM[places_M >= sizes_B.astype(np.uint64)[:, None]] = np.iinfo(np.uint64).max
    last_B1 = np.maximum(counts_B - 1, 0)[:, None]
    largest_B1 = np.take_along_axis(np.sort(drawn_BM, axis=1), last_B1, axis=1)
    return (drawn_BM <= largest_B1) & (counts_B > 0)[:, None]
