"""The training stream: the samples of each step, over sources, epochs and tar files, and their contents.

The order is computed from timeline, seed and step only; ranks, threads and restarts ask for slices of it.
"""

from __future__ import annotations

import threading
from collections import OrderedDict
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import Future
from dataclasses import dataclass
from typing import Literal

import numpy as np
import xxhash

from llmtrain.data.datasets.base import EMPTY, Dataset, OrdersByLength, ReadsTars, gather
from llmtrain.data.mixture import Timeline
from llmtrain.data.order import BlockOrder, LaneOrder, LengthOrder, epoch_key, sample_keys
from llmtrain.errors import DataError, Problem

GaveUp = Callable[[], bool]
"""Returns whether the result of a prefetching thread is no longer needed."""
Agree = Callable[[str, Sequence[int], GaveUp], list[int]]
"""(key, numbers of this rank, whether to stop waiting) → set union over all ranks of the numbers for the key;
called by all ranks, from any thread."""
Skipped = frozenset[tuple[int, int, int]]
"""(source, epoch, tar file) of skipped tar files."""

_BLOCKS_KEPT = 64
_DIGEST_BITS = 48
"""Sums of this size are exact in trackers that store numbers as doubles."""


@dataclass(frozen=True)
class Origins:
    """The origins of M samples of a step, all int64 (M,)."""

    sources: np.ndarray
    """Indices of the sources in the stream."""
    epochs: np.ndarray
    """Epochs of the sources, from 0."""
    indices: np.ndarray
    """Numbers of the samples in their source; EMPTY in a skipped tar file."""


class Stream:
    """The samples of a training run in order. Thread-safe."""

    def __init__(
        self,
        sources: Mapping[str, Dataset],
        timeline: Timeline,
        *,
        seed: int,
        shuffle_tars: int,
        drop_last: bool = False,
        continued: bool = False,
        on_bad_tar: Literal["error", "skip"] = "error",
        agree: Agree | None = None,
        on_skip: Callable[[str, int], None] = lambda tar, samples: None,
    ) -> None:
        """sources: the datasets of the timeline's sources. shuffle_tars: number of tar files among which
        samples are shuffled. drop_last: whether an epoch ends with its last full step. continued: whether
            the rows of a step follow those of the step before. agree: required by
        on_bad_tar="skip" with several ranks. on_skip: called with (name, samples) of each skipped tar file.

        Raise DataError if drop_last is set and a source is smaller than a step.
        """
        self.timeline = timeline
        self.names = list(sources)
        self._datasets = list(sources.values())
        self._seed = seed
        self._skips = on_bad_tar == "skip"
        self._agree = agree
        self._on_skip = on_skip
        self._orders: list[BlockOrder] = []
        for name, dataset in sources.items():
            global_size = timeline.segments[-1].global_size
            epoch_length = samples_of_epoch(len(dataset), global_size, drop_last)
            if epoch_length == 0:
                got = f"true with {len(dataset):,} samples and steps of {global_size:,}"
                raise DataError(Problem("data.drop_last", got, "a whole step or more", "give false"))
            source_seed = _source_seed(seed, name)
            if continued:
                self._orders.append(LaneOrder(dataset.tar_sizes, lanes=global_size))
                continue
            if isinstance(dataset, OrdersByLength):
                self._orders.append(
                    LengthOrder(
                        dataset.lengths, seed=source_seed, group=dataset.group, epoch_length=epoch_length
                    )
                )
                continue
            self._orders.append(
                BlockOrder(
                    dataset.tar_sizes,
                    seed=source_seed,
                    block_tars=shuffle_tars,
                    epoch_length=epoch_length,
                )
            )
        self._blocks: list[OrderedDict[tuple[int, int], Future[frozenset[int]]]]
        self._blocks = [OrderedDict() for _ in sources]
        self._bad: dict[tuple[int, int], set[int]] = {}
        """(source, epoch) → its bad tar files."""
        self._lock = threading.Lock()

    def samples(self, step: int) -> range:
        """Return the global numbers of the samples of `step`, over all ranks."""
        return self.timeline.samples(step)

    def enter(self, step: int, gave_up: GaveUp = lambda: False) -> Skipped:
        """Request the tar files of `step` and of the block after it; return those to skip.

        If bad tar files are skipped, all ranks agree on them, so all ranks must call this for every step that
        they read.
        """
        samples = self.samples(step)
        segment = self.timeline.at(step)
        before, after = segment.positions_at(samples.start), segment.positions_at(samples.stop)
        skipped: set[tuple[int, int, int]] = set()
        for source, name in enumerate(self.names):
            first, last = before.get(name, 0), after.get(name, 0)
            for epoch, block in self._orders[source].blocks(first, last):
                bad = self._enter_block(source, epoch, block, gave_up).result()
                skipped.update((source, epoch, tar) for tar in bad)
        return frozenset(skipped)

    def origins(self, numbers: range, step: int, skipped: Skipped = frozenset()) -> Origins:
        """Return the origins of samples `numbers` of `step`. skipped: the result of `enter` for the step."""
        segment = self.timeline.at(step)
        drawn, positions = segment.draw(numbers.start, numbers.stop)
        drawn_from = np.array([self.names.index(name) for name in segment.shares])
        sources = drawn_from[drawn]
        epochs, indices = np.empty_like(positions), np.empty_like(positions)
        for source in np.unique(sources).tolist():
            chosen = sources == source
            epochs[chosen], indices[chosen] = self._orders[source](positions[chosen])
        if skipped:
            for row, (source, epoch, index) in enumerate(zip(sources, epochs, indices, strict=True)):
                if (source, epoch, self._orders[source].tar_of(index)) in skipped:
                    indices[row] = EMPTY
        return Origins(sources, epochs, indices)

    def keys(self, origins: Origins) -> np.ndarray:
        """Return a number for each sample, int64 (M,), that depends on (seed, source, epoch, sample)."""
        keys = np.empty_like(origins.indices)
        for source, epoch in np.unique(np.stack([origins.sources, origins.epochs]), axis=1).T.tolist():
            chosen = (origins.sources == source) & (origins.epochs == epoch)
            key = epoch_key(_source_seed(self._seed, self.names[source]), epoch)
            keys[chosen] = sample_keys(origins.indices[chosen], key)
        return keys

    def get(self, origins: Origins) -> dict[str, np.ndarray]:
        """Return the stacked contents of the samples, as Dataset.get does."""
        return gather(self._datasets, origins.sources, origins.indices)

    def progress(self, step: int) -> dict[str, float]:
        """Return the number of epochs, with fraction, that each source has completed before `step`: "epoch"
        for a single source, else "epoch_NAME"."""
        segment = self.timeline.at(step)
        positions = segment.positions_at(segment.first_sample(step))
        many = len(self.names) > 1
        return {
            f"epoch_{name}" if many else "epoch": positions.get(name, 0) / order.epoch_length
            for name, order in zip(self.names, self._orders, strict=True)
        }

    def describe(self, micro_size: int | None = None) -> str:
        """Return a description in one line. micro_size: rows of a batch that is as wide as its longest; its
        padding is described too, of a single source."""
        many = len(self.names) > 1
        described = []
        for source, (name, dataset) in enumerate(zip(self.names, self._datasets, strict=True)):
            text = f"{name}: {dataset.describe()}" if many else dataset.describe()
            if micro_size is not None and isinstance(dataset, OrdersByLength) and not many:
                text += f", {self._padding(source, micro_size, dataset):.1%} of a batch is padding"
            described.append(text)
        return "; ".join(described)

    def _padding(self, source: int, micro_size: int, dataset: OrdersByLength) -> float:
        """Return the share of padding in the batches of the first epoch."""
        order = self._orders[source]
        rows = order(np.arange(order.epoch_length))[1]
        batches = (rows[start : start + micro_size] for start in range(0, len(rows), micro_size))
        return 1.0 - float(dataset.lengths[rows].sum() / sum(map(dataset.batch_tokens, batches)))

    def _enter_block(self, source: int, epoch: int, block: int, gave_up: GaveUp) -> Future[frozenset[int]]:
        key, blocks = (epoch, block), self._blocks[source]
        with self._lock:
            found = blocks.get(key)
            if found is not None:
                blocks.move_to_end(key)
                return found
            entered = blocks[key] = Future()
            if len(blocks) > _BLOCKS_KEPT:
                blocks.popitem(last=False)
        try:
            entered.set_result(self._prepare_block(source, epoch, block, gave_up))
        except BaseException as error:
            entered.set_exception(error)
            with self._lock:
                blocks.pop(key, None)
            raise
        return entered

    def _prepare_block(self, source: int, epoch: int, block: int, gave_up: GaveUp) -> frozenset[int]:
        """Request the tar files of a block and of the next one; return those of the block to skip."""
        dataset, order = self._datasets[source], self._orders[source]
        if not isinstance(dataset, ReadsTars):
            return frozenset()
        tars = order.tars_of(epoch, block)
        dataset.want([*tars, *order.tars_of(*order.after(epoch, block))])
        if not self._skips:
            return frozenset()
        bad = dataset.find_bad(tars)
        if self._agree is not None:
            bad = self._agree(f"{source}/{epoch}/{block}", bad, gave_up)
        sizes = dataset.tar_sizes
        bad = [tar for tar in bad if sizes[tar]]
        with self._lock:
            in_epoch = self._bad.setdefault((source, epoch), set())
            in_epoch.update(bad)
            num_bad = len(in_epoch)
        if num_bad == int(np.count_nonzero(sizes)):
            got = f"no readable one of {num_bad} tar files"
            raise DataError(Problem(f"data.path ({dataset.tar_names[bad[0]]})", got, "one or more"))
        for tar in bad:
            self._on_skip(dataset.tar_names[tar], int(sizes[tar]))
        return frozenset(bad)


def samples_of_epoch(num_samples: int, global_size: int, drop_last: bool) -> int:
    """Return the number of samples of a source that an epoch uses."""
    return num_samples - num_samples % global_size if drop_last else num_samples


def digest(raw: Mapping[str, np.ndarray], numbers: range) -> int:
    """Return a digest below 2^48 of the contents and global numbers of samples. The digests of the parts of a
    step add up, modulo 2^48, to that of the whole step, however it is divided."""
    total = 0
    arrays = [np.ascontiguousarray(raw[key]) for key in sorted(raw)]
    for row, number in enumerate(numbers):
        for array in arrays:
            total += xxhash.xxh3_64_intdigest(array[row].data, number)
    return combine_digests(total)


def combine_digests(total: int) -> int:
    """Return the digest of the whole from the sum of the digests of its parts."""
    return total % (1 << _DIGEST_BITS)


def _source_seed(seed: int, name: str) -> int:
    """Return a seed per source, so that sources of equal size have different orders."""
    return seed ^ xxhash.xxh3_64_intdigest(name.encode()) if name else seed
