"""The order of samples: pure functions of seed and number, independent of world size, workers and time.

The samples of a dataset are stored in tar files, or in whatever units a dataset reads at a time. In each
epoch the tar files are permuted. Each `block_tars` consecutive ones form a block, and the samples are
permuted within their block. A reader thus needs the tar files of one block at a time, whatever the size of
the dataset. The sample at any position in the order is found in constant time and memory, so that a run
resumes at once and each rank computes only its own slice.
"""

from __future__ import annotations

import threading
from collections import OrderedDict
from collections.abc import Iterator

import numpy as np

from llmtrain.hashing import mix

_EPOCHS_KEPT = 4
_ROUNDS = 8
_RUN = 4096
"""Consecutive positions in the order that are computed together and cached: numpy takes as long for ten as
for a thousand."""
_RUNS_KEPT = 8
_WORD = (1 << 64) - 1
_GOLDEN_GAMMA = 0x9E3779B97F4A7C15
_TARS = 0x5368617264730000
"""Makes the order of tar files independent of the order within blocks."""
_SAMPLES = 0x53616D706C650000
"""Makes the keys of samples independent of their order."""


def permute(indices: np.ndarray, length: int, key: int) -> np.ndarray:
    """Apply the pseudo-random bijection on [0, length) that `key` (64 bits) selects.

    A balanced Feistel network (Luby and Rackoff 1988) permutes the smallest 2^(2h) ≥ length values; results
    outside [0, length) are permuted again until they are inside (cycle walking, Black and Rogaway 2002), in
    fewer than four rounds on average.

    indices: integers in [0, length), any shape. Return int64 of the same shape.
    Raise ValueError for an index outside.
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
    """Return the 64-bit key of the permutation of one epoch."""
    return _mix(_mix(seed) + epoch * _GOLDEN_GAMMA)


def sample_keys(indices: np.ndarray, key: int) -> np.ndarray:
    """Return a 63-bit number for each sample, int64 of the shape of `indices`, from which objectives derive
    random choices.

    indices: numbers of the samples in their source; key: from `epoch_key`.
    """
    values = np.asarray(indices, dtype=np.int64).astype(np.uint64) + np.uint64(1)
    hashed = mix(np.uint64(_mix(key ^ _SAMPLES)) + values * np.uint64(_GOLDEN_GAMMA))
    return (hashed >> np.uint64(1)).astype(np.int64)


class BlockOrder:
    """The order of the samples of one dataset over an unlimited number of epochs. Thread-safe."""

    def __init__(
        self, tar_sizes: np.ndarray, *, seed: int, block_tars: int, epoch_length: int | None = None
    ) -> None:
        """tar_sizes: number of samples in each tar file, (S,), not all 0. epoch_length: number of samples in
        an epoch, if the last ones of its order are dropped."""
        self._sizes = np.asarray(tar_sizes, dtype=np.int64)
        self._firsts = np.concatenate([np.zeros(1, np.int64), np.cumsum(self._sizes)])
        self._seed = seed
        self._block_tars = block_tars
        self.epoch_length = int(self._firsts[-1]) if epoch_length is None else epoch_length
        self._epochs: OrderedDict[int, _Epoch] = OrderedDict()
        self._run_length = min(_RUN, self.epoch_length)
        self._runs: OrderedDict[int, tuple[np.ndarray, np.ndarray]] = OrderedDict()
        self._lock = threading.Lock()

    def __call__(self, positions: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Return (epochs, indices into the dataset), int64 of the same shape, of the samples at `positions`,
        counted from 0 over all epochs."""
        positions = np.asarray(positions, dtype=np.int64)
        if positions.size == 0:
            return np.empty_like(positions), np.empty_like(positions)
        length = self._run_length
        first, last = int(positions.min()) // length, int(positions.max()) // length
        if last - first > positions.size // length + 1:
            return self._ordered(positions)
        runs = [self._run(run) for run in range(first, last + 1)]
        epochs, indices = (np.concatenate(column) for column in zip(*runs, strict=True))
        offsets = positions - first * length
        return epochs[offsets], indices[offsets]

    def _run(self, run: int) -> tuple[np.ndarray, np.ndarray]:
        """Return (epochs, indices) of a run of _RUN consecutive positions."""
        with self._lock:
            found = self._runs.get(run)
        if found is None:
            found = self._ordered(run * self._run_length + np.arange(self._run_length))
            with self._lock:
                self._runs[run] = found
                if len(self._runs) > _RUNS_KEPT:
                    self._runs.popitem(last=False)
        return found

    def _ordered(self, positions: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        epochs, offsets = np.divmod(positions, self.epoch_length)
        indices = np.empty_like(offsets)
        for epoch in np.unique(epochs).tolist():
            chosen = epochs == epoch
            indices[chosen] = self._epoch(epoch).indices(offsets[chosen])
        return epochs, indices

    def blocks(self, first: int, last: int) -> list[tuple[int, int]]:
        """Return (epoch, block) of the blocks that contain positions [first, last), in order."""
        found = []
        position = first
        while position < last:
            epoch, offset = divmod(position, self.epoch_length)
            block, end = self._epoch(epoch).block_at(offset)
            found.append((epoch, block))
            position = min(epoch * self.epoch_length + end, (epoch + 1) * self.epoch_length)
        return found

    def tars_of(self, epoch: int, block: int) -> list[int]:
        """Return the tar files of a block, in the order of the epoch; none after its last block."""
        tars = self._epoch(epoch).tars[block * self._block_tars : (block + 1) * self._block_tars]
        return tars.tolist()

    def tar_of(self, index: int) -> int:
        """Return the tar file that contains a sample."""
        return int(np.searchsorted(self._firsts, index, side="right")) - 1

    def after(self, epoch: int, block: int) -> tuple[int, int]:
        """Return (epoch, block) of the next block."""
        blocks = -(-len(self._sizes) // self._block_tars)
        return (epoch, block + 1) if block + 1 < blocks else (epoch + 1, 0)

    def _epoch(self, epoch: int) -> _Epoch:
        with self._lock:
            found = self._epochs.get(epoch)
            if found is None:
                key = epoch_key(self._seed, epoch)
                found = self._epochs[epoch] = _Epoch(self._sizes, self._firsts, key, self._block_tars)
                if len(self._epochs) > _EPOCHS_KEPT:
                    self._epochs.popitem(last=False)
        return found


class LengthOrder(BlockOrder):
    """The order of rows of different lengths. Rows of like length follow each other in groups, and the groups
    are shuffled, so that micro-batches need little padding."""

    POOL = 64
    """Groups that are made together: the rows of a pool are drawn at random, and sorted by length."""

    def __init__(
        self, lengths: np.ndarray, *, seed: int, group: int, epoch_length: int | None = None
    ) -> None:
        """lengths: tokens of each row, (N,); group: rows of a group."""
        super().__init__(np.array([len(lengths)]), seed=seed, block_tars=1, epoch_length=epoch_length)
        self._lengths, self._group = np.asarray(lengths), group
        self._orders: OrderedDict[int, np.ndarray] = OrderedDict()

    def _ordered(self, positions: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        epochs, offsets = np.divmod(positions, self.epoch_length)
        indices = np.empty_like(offsets)
        for epoch in np.unique(epochs).tolist():
            chosen = epochs == epoch
            indices[chosen] = self._order_of(epoch)[offsets[chosen]]
        return epochs, indices

    def _order_of(self, epoch: int) -> np.ndarray:
        """Return the rows of an epoch in order, (N,)."""
        with self._lock:
            found = self._orders.get(epoch)
        if found is not None:
            return found
        drawn = self._epoch(epoch).indices(np.arange(len(self._lengths)))
        pools, size = [], self._group * self.POOL
        for number, start in enumerate(range(0, len(drawn), size)):
            pool = drawn[start : start + size]
            pool = pool[np.argsort(self._lengths[pool], kind="stable")]
            groups = np.arange(-(-len(pool) // self._group))
            key = _mix(epoch_key(self._seed, epoch) + (number + 1) * _GOLDEN_GAMMA)
            shuffled = permute(groups, len(groups), key)
            pools.append(np.concatenate([pool[g * self._group : (g + 1) * self._group] for g in shuffled]))
        order = np.concatenate(pools)
        with self._lock:
            self._orders[epoch] = order
            if len(self._orders) > _EPOCHS_KEPT:
                self._orders.popitem(last=False)
        return order


class LaneOrder(BlockOrder):
    """The order of samples as they are stored, in lanes of equal length: sample i of a step follows sample i
    of the step before. What is left after the last whole step of an epoch is not used."""

    def __init__(self, tar_sizes: np.ndarray, *, lanes: int) -> None:
        """lanes: samples of a step."""
        length = int(np.sum(tar_sizes)) // lanes
        super().__init__(tar_sizes, seed=0, block_tars=len(tar_sizes), epoch_length=length * lanes)
        self._lanes, self._lane_length = lanes, length

    def _ordered(self, positions: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        epochs, offsets = np.divmod(positions, self.epoch_length)
        steps, lanes = np.divmod(offsets, self._lanes)
        return epochs, lanes * self._lane_length + steps


class _Epoch:
    """The order of one epoch."""

    def __init__(self, sizes: np.ndarray, firsts: np.ndarray, key: int, block_tars: int) -> None:
        S = len(sizes)
        self.tars = permute(np.arange(S), S, _mix(key ^ _TARS))
        self._key = key
        self._block_tars = block_tars
        self._firsts = firsts[self.tars]
        self._starts = np.concatenate([np.zeros(1, np.int64), np.cumsum(sizes[self.tars])])
        self._block_starts = np.append(self._starts[:-1:block_tars], self._starts[-1])

    def block_at(self, offset: int) -> tuple[int, int]:
        """Return (block at `offset` samples into the epoch, offset of its end)."""
        block = int(np.searchsorted(self._block_starts, offset, side="right")) - 1
        return block, int(self._block_starts[block + 1])

    def indices(self, offsets: np.ndarray) -> np.ndarray:
        """Return the indices into the dataset of the samples at `offsets` into the epoch."""
        blocks = np.searchsorted(self._block_starts, offsets, side="right") - 1
        shuffled = np.empty_like(offsets)
        for block in np.unique(blocks).tolist():
            chosen = blocks == block
            start, end = self._block_starts[block : block + 2].tolist()
            # The first block uses the key of the epoch: the order of a single tar file is that of earlier
            # versions.
            key = _mix(self._key + block * _GOLDEN_GAMMA) if block else self._key
            shuffled[chosen] = start + permute(offsets[chosen] - start, end - start, key)
        slots = np.searchsorted(self._starts, shuffled, side="right") - 1
        return self._firsts[slots] + shuffled - self._starts[slots]


def batches_by_length(lengths: np.ndarray, most_tokens: int) -> Iterator[np.ndarray]:
    """Yield the numbers of rows of like length, the longest first, in batches of at most `most_tokens` with
    padding, or of one row."""
    order = np.argsort(-lengths, kind="stable")
    start = 0
    while start < len(order):
        count = max(1, most_tokens // max(1, int(lengths[order[start]])))
        yield order[start : start + count]
        start += count


def rank_slice(samples: range, data_rank: int, data_size: int) -> range:
    """Return the contiguous slice of the samples of a step that belongs to one data-parallel rank.

    Raise ValueError unless data_size divides the number of samples.
    """
    share, rest = divmod(len(samples), data_size)
    if rest:
        raise ValueError(f"global_size={len(samples)} is not a multiple of data_size={data_size}")
    return samples[data_rank * share : (data_rank + 1) * share]


def _feistel(values: np.ndarray, half_bits: int, round_keys: list[int]) -> np.ndarray:
    shift, mask = np.uint64(half_bits), np.uint64((1 << half_bits) - 1)
    left, right = values >> shift, values & mask
    for round_key in round_keys:
        left, right = right, left ^ (mix(right + np.uint64(round_key)) & mask)
    return (left << shift) | right


def _mix(value: int) -> int:
    """Apply the finalizer of splitmix64 (Steele, Lea and Flood 2014)."""
    value &= _WORD
    value = (value ^ (value >> 30)) * 0xBF58476D1CE4E5B9 & _WORD
    value = (value ^ (value >> 27)) * 0x94D049BB133111EB & _WORD
    return value ^ (value >> 31)
