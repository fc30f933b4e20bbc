"""Which sample comes when: pure functions of (seed, position), free of world size, workers and time.

Training sample number n (counted from 0 over the whole run) is sample `permute(n % length)` of epoch
n // length. Any position is found in constant time and memory, so that a run resumes at once and
each rank computes its own slice alone.
"""

from __future__ import annotations

import numpy as np

_ROUNDS = 8
_WORD = (1 << 64) - 1
_GOLDEN_GAMMA = 0x9E3779B97F4A7C15


def permute(indices: np.ndarray, length: int, key: int) -> np.ndarray:
    """A pseudo-random bijection on [0, length), chosen by `key` (64 bits).

    A balanced Feistel network (Luby and Rackoff 1988) permutes the smallest 2^(2h) ≥ length values;
    results outside [0, length) are permuted again until inside (cycle walking, Black and Rogaway 2002),
    which takes fewer than four rounds on average.

    indices: whole numbers in [0, length), any shape. Returns int64 of the same shape.
    Raises ValueError for an index outside.
    """
    values = np.array(indices, dtype=np.int64).reshape(-1)
    if values.size and (values.min() < 0 or values.max() >= length):
        raise ValueError(f"indices must lie in [0, {length})")
    half_bits = max(1, ((length - 1).bit_length() + 1) // 2)
    round_keys = [_mix(key + r * _GOLDEN_GAMMA) for r in range(1, _ROUNDS + 1)]
    result = _feistel(values.astype(np.uint64), half_bits, round_keys)
    while (outside := result >= length).any():
        result[outside] = _feistel(result[outside], half_bits, round_keys)
    return result.astype(np.int64).reshape(np.shape(indices))


def epoch_key(seed: int, epoch: int) -> int:
    """The 64-bit key of one epoch's permutation."""
    return _mix(_mix(seed) + epoch * _GOLDEN_GAMMA)


def sample_indices(numbers: np.ndarray, length: int, seed: int) -> tuple[np.ndarray, np.ndarray]:
    """Global sample numbers → (epochs, indices into the dataset), both int64 of the same shape."""
    epochs, places = np.divmod(np.asarray(numbers, dtype=np.int64), length)
    indices = np.empty_like(places)
    for epoch in np.unique(epochs):
        chosen = epochs == epoch
        indices[chosen] = permute(places[chosen], length, epoch_key(seed, int(epoch)))
    return epochs, indices


def global_samples(step: int, global_size: int, length: int, seed: int) -> tuple[np.ndarray, np.ndarray]:
    """(epochs, indices) of the `global_size` samples that optimizer step `step` takes, over all ranks."""
    return sample_indices(np.arange(step * global_size, (step + 1) * global_size), length, seed)


def rank_slice(step: int, global_size: int, data_rank: int, data_size: int) -> range:
    """The global sample numbers that one data-parallel rank takes in a step: a contiguous share.

    Raises ValueError unless data_size divides global_size.
    """
    share, rest = divmod(global_size, data_size)
    if rest:
        raise ValueError(f"global_size={global_size} is no multiple of data_size={data_size}")
    start = step * global_size + data_rank * share
    return range(start, start + share)


def _feistel(values: np.ndarray, half_bits: int, round_keys: list[int]) -> np.ndarray:
    shift, mask = np.uint64(half_bits), np.uint64((1 << half_bits) - 1)
    left, right = values >> shift, values & mask
    for round_key in round_keys:
        left, right = right, left ^ (_mix_array(right + np.uint64(round_key)) & mask)
    return (left << shift) | right


def _mix(value: int) -> int:
    """The finalizer of splitmix64 (Steele, Lea and Flood 2014)."""
    value &= _WORD
    value = (value ^ (value >> 30)) * 0xBF58476D1CE4E5B9 & _WORD
    value = (value ^ (value >> 27)) * 0x94D049BB133111EB & _WORD
    return value ^ (value >> 31)


def _mix_array(values: np.ndarray) -> np.ndarray:
    values = (values ^ (values >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    values = (values ^ (values >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return values ^ (values >> np.uint64(31))
