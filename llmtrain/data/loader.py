"""Feeds one data-parallel rank: which samples each optimizer step takes, read ahead by threads.

Threads, not processes: reading a step is a few positioned reads and numpy copies, which release the
interpreter, and nothing is copied between processes (measured in tests/bench/loader.py).
"""

from __future__ import annotations

import itertools
import time
from collections import deque
from collections.abc import Callable, Generator, Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from typing import TYPE_CHECKING, TypeVar

import numpy as np

from llmtrain.data.datasets import EMPTY, Dataset
from llmtrain.data.order import rank_slice, sample_indices

if TYPE_CHECKING:
    from torch import Tensor

Batch = dict[str, "Tensor"]
Collate = Callable[[dict[str, np.ndarray]], Batch]
K = TypeVar("K")
V = TypeVar("V")


@dataclass(frozen=True)
class MicroBatch:
    """What one forward pass takes, with its place in the global order."""

    batch: Batch
    samples: range
    """Global sample numbers, one a row: over the whole run in training, over the pass in evaluation."""
    indices: np.ndarray
    """The dataset's own numbers of these samples, int64; EMPTY in rows that only fill up."""

    @property
    def first_sample(self) -> int:
        return self.samples.start


@dataclass(frozen=True)
class StepBatches:
    """One rank's share of an optimizer step."""

    step: int
    micro_batches: list[MicroBatch]
    wait_seconds: float
    """How long the consumer stood still for this step."""


class Loader:
    """Training steps for one data-parallel rank.

    Step k takes global samples [k·G, (k+1)·G); rank r the r-th contiguous share of them, in micro-batches
    of M. What a step holds depends on (dataset, seed, G, M, rank, size) alone, never on `workers` or on
    where the run began.
    """

    def __init__(
        self,
        dataset: Dataset,
        collate: Collate,
        *,
        seed: int,
        global_size: int,
        micro_size: int,
        data_rank: int = 0,
        data_size: int = 1,
        workers: int = 0,
        pin_memory: bool = False,
    ) -> None:
        """global_size counts the samples of a step over all ranks, micro_size those of one forward pass.

        workers: threads that read ahead; 0 reads when asked. pin_memory: page-locked batches, which a
        GPU copies without blocking.
        Raises ValueError unless global_size is a multiple of micro_size · data_size.
        """
        if global_size % (micro_size * data_size):
            raise ValueError(
                f"global_size={global_size} is no multiple of micro_size={micro_size} · data_size={data_size}"
            )
        self._dataset = dataset
        self._collate = collate
        self._seed = seed
        self._global_size = global_size
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
        fetched = _in_order(self._fetch, itertools.count(start_step), self._workers)
        try:
            for step in itertools.count(start_step):
                started = time.perf_counter()
                micro_batches = next(fetched)
                yield StepBatches(step, micro_batches, time.perf_counter() - started)
        finally:
            fetched.close()

    def _fetch(self, step: int) -> list[MicroBatch]:
        share = rank_slice(step, self._global_size, self._data_rank, self._data_size)
        _, indices = sample_indices(np.array(share), len(self._dataset), self._seed)
        M = self._micro_size
        return [
            _micro_batch(self._dataset, self._collate, share[i : i + M], indices[i : i + M], self._pin_memory)
            for i in range(0, len(share), M)
        ]


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
) -> Iterator[MicroBatch]:
    """One pass in the dataset's own order, each sample once over all ranks.

    Every rank gets equally many micro-batches of micro_size rows; where the samples run out, rows are
    EMPTY. max_samples takes so many samples, evenly spaced, since neighbours come from one source.
    """
    length = len(dataset) if max_samples is None else min(len(dataset), max_samples)
    global_size = micro_size * data_size

    def fetch(step: int) -> MicroBatch:
        samples = rank_slice(step, global_size, data_rank, data_size)
        places = np.array(samples)
        indices = np.where(places < length, places * len(dataset) // length, EMPTY)
        return _micro_batch(dataset, collate, samples, indices, pin_memory)

    yield from _in_order(fetch, iter(range(-(-length // global_size))), workers)


def _micro_batch(
    dataset: Dataset, collate: Collate, samples: range, indices: np.ndarray, pin_memory: bool
) -> MicroBatch:
    batch = collate(dataset.get(indices))
    if pin_memory:
        batch = {name: tensor.pin_memory() for name, tensor in batch.items()}
    return MicroBatch(batch, samples, indices)


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
