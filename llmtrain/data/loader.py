"""Feeds one data-parallel rank: which samples each optimizer step takes, read ahead by threads.

Threads, not processes: reading a step is a few positioned reads and numpy copies, which release the
interpreter, and nothing is copied between processes (measured in tests/bench/loader.py).
"""

from __future__ import annotations

import itertools
import threading
import time
from collections import deque
from collections.abc import Callable, Generator, Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from typing import TYPE_CHECKING, TypeVar

import numpy as np

from llmtrain.data.datasets.base import EMPTY, Dataset
from llmtrain.data.order import epoch_key, rank_slice, sample_keys
from llmtrain.data.stream import Stream, digest

if TYPE_CHECKING:
    from torch import Tensor

Batch = dict[str, "Tensor"]
Collate = Callable[[dict[str, np.ndarray]], Batch]
KEYS = "keys"
"""In what is collated: a number for each sample, int64 (M,), the same wherever and whenever it is read in
this epoch; objectives make their choices by it."""
_EVALUATION_KEY = epoch_key(0, 0)
"""An evaluation asks the same of every model."""
K = TypeVar("K")
V = TypeVar("V")


@dataclass(frozen=True)
class MicroBatch:
    """What one forward pass takes, with its place in the global order."""

    batch: Batch
    samples: range
    """Global sample numbers, one a row: over the whole run in training, over the pass in evaluation."""
    indices: np.ndarray
    """Their numbers within their source, int64; EMPTY in rows that only fill up."""
    digest: int = 0
    """Of the samples' content and numbers, in training."""
    num_skipped: int = 0
    """Rows left empty in training, since their shard cannot be read."""

    @property
    def first_sample(self) -> int:
        return self.samples.start


@dataclass(frozen=True)
class StepBatches:
    """One rank's share of an optimizer step."""

    step: int
    micro_batches: list[MicroBatch]
    progress: dict[str, float]
    """After how many epochs each source stands behind this step."""
    wait_seconds: float
    """How long the consumer stood still for this step."""


class Loader:
    """Training steps for one data-parallel rank.

    A step takes G global samples; rank r the r-th contiguous share of them, in micro-batches of M. What a
    step holds depends on (stream, M, rank, size) alone, never on `workers` or on where the run began.
    """

    def __init__(
        self,
        stream: Stream,
        collate: Collate,
        *,
        micro_size: int,
        data_rank: int = 0,
        data_size: int = 1,
        workers: int = 0,
        pin_memory: bool = False,
    ) -> None:
        """micro_size counts the samples of one forward pass.

        workers: threads that read ahead; 0 reads when asked. pin_memory: page-locked batches, which a
        GPU copies without blocking.
        Raise ValueError unless the stream's steps are multiples of micro_size · data_size.
        """
        # Earlier segments of a timeline may have had steps of other sizes.
        global_size = stream.timeline.segments[-1].global_size
        if global_size % (micro_size * data_size):
            raise ValueError(
                f"global_size={global_size} is no multiple of micro_size={micro_size} · data_size={data_size}"
            )
        self.stream = stream
        self._collate = collate
        self._micro_size = micro_size
        self._data_rank = data_rank
        self._data_size = data_size
        self._workers = workers
        self._pin_memory = pin_memory

    def steps(self, start_step: int = 0) -> Iterator[StepBatches]:
        """Steps from `start_step` on, without end; any start is found in constant time.

        Close the iterator (or drop it) to stop its threads. An error while reading is raised here as
        itself, at the step where it happened.
        """
        ended = threading.Event()
        fetched = _in_order(lambda step: self._fetch(step, ended), itertools.count(start_step), self._workers)
        try:
            for step in itertools.count(start_step):
                started = time.perf_counter()
                micro_batches = next(fetched)
                waited = time.perf_counter() - started
                yield StepBatches(step, micro_batches, self.stream.progress(step + 1), waited)
        finally:
            # A thread that reads ahead may wait for other ranks, which read no further.
            ended.set()
            fetched.close()

    def _fetch(self, step: int, ended: threading.Event) -> list[MicroBatch]:
        skipped = self.stream.enter(step, ended.is_set)
        samples = self.stream.samples(step)
        share = rank_slice(samples, self._data_rank, self._data_size)
        # Read together: what a call costs is shared by more rows.
        places = self.stream.places(share, step, skipped)
        raw = self.stream.get(places)
        keys = self.stream.keys(places)
        M = self._micro_size
        return [
            self._micro_batch(
                share[i : i + M],
                places.indices[i : i + M],
                {key: values[i : i + M] for key, values in raw.items()},
                keys[i : i + M],
            )
            for i in range(0, len(share), M)
        ]

    def _micro_batch(
        self, samples: range, indices: np.ndarray, raw: dict[str, np.ndarray], keys: np.ndarray
    ) -> MicroBatch:
        return MicroBatch(
            _tensors({**raw, KEYS: keys}, self._collate, self._pin_memory),
            samples,
            indices,
            digest(raw, samples),
            int((indices == EMPTY).sum()),
        )


def evaluation_batches(
    dataset: Dataset,
    collate: Collate,
    *,
    micro_size: int,
    data_rank: int = 0,
    data_size: int = 1,
    workers: int = 0,
    max_samples: int | None = None,
    pin_memory: bool = False,
) -> Generator[MicroBatch, None, None]:
    """One pass in the dataset's own order, each sample once over all ranks.

    Every rank gets equally many micro-batches of micro_size rows; where the samples run out, rows are
    EMPTY. max_samples takes so many samples, evenly spaced, since neighbours come from one source.
    """
    length = len(dataset) if max_samples is None else min(len(dataset), max_samples)
    global_size = micro_size * data_size

    def fetch(step: int) -> MicroBatch:
        samples = rank_slice(range(step * global_size, (step + 1) * global_size), data_rank, data_size)
        places = np.array(samples)
        indices = np.where(places < length, places * len(dataset) // length, EMPTY)
        raw = {**dataset.get(indices), KEYS: sample_keys(indices, _EVALUATION_KEY)}
        return MicroBatch(_tensors(raw, collate, pin_memory), samples, indices)

    yield from _in_order(fetch, iter(range(-(-length // global_size))), workers)


def _tensors(raw: dict[str, np.ndarray], collate: Collate, pin_memory: bool) -> Batch:
    batch = collate(raw)
    return {name: tensor.pin_memory() for name, tensor in batch.items()} if pin_memory else batch


def _in_order(fetch: Callable[[K], V], keys: Iterable[K], workers: int) -> Generator[V, None, None]:
    """`map(fetch, keys)`, computed ahead by threads; at most workers + 1 results wait at a time."""
    if workers == 0:
        yield from map(fetch, keys)
        return
    keys = iter(keys)
    pool = ThreadPoolExecutor(max_workers=workers, thread_name_prefix="loader")
    waiting: deque[Future[V]] = deque()
    try:
        for key in itertools.islice(keys, workers + 1):
            waiting.append(pool.submit(fetch, key))
        while waiting:
            result = waiting.popleft().result()
            for key in itertools.islice(keys, 1):
                waiting.append(pool.submit(fetch, key))
            yield result
    finally:
        pool.shutdown(wait=True, cancel_futures=True)
