"""Load the batches of one data-parallel rank, prefetched by threads.

Threads are used instead of processes: reading a step consists of a few positioned reads and numpy copies,
which release the GIL, and nothing is copied between processes (measured in tests/bench/loader.py).
"""

from __future__ import annotations

import itertools
import threading
import time
from collections import deque
from collections.abc import Callable, Generator, Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from typing import TYPE_CHECKING, Protocol, TypeVar

import numpy as np

from llmtrain.data.datasets.base import EMPTY, Concatenation, Dataset
from llmtrain.data.order import epoch_key, rank_slice, sample_keys
from llmtrain.data.stream import Stream, digest

if TYPE_CHECKING:
    from torch import Tensor

Batch = dict[str, "Tensor"]
Collate = Callable[[dict[str, np.ndarray]], Batch]
KEYS = "keys"
"""Key, in the collated arrays, of a number per sample, int64 (M,), that depends only on sample and epoch;
objectives derive their random choices from it."""
_EVALUATION_KEY = epoch_key(0, 0)
"""Constant, so that every evaluation makes the same random choices."""
K = TypeVar("K")
V = TypeVar("V")


@dataclass(frozen=True)
class MicroBatch:
    """The batch of one forward pass, and its samples."""

    batch: Batch
    samples: range
    """Global sample numbers, one per row: in the whole run for training, in the pass for evaluation."""
    indices: np.ndarray
    """Numbers of the samples in their source, int64; EMPTY in padding rows."""
    digest: int = 0
    """Digest of contents and numbers of the samples; training only."""
    num_skipped: int = 0
    """Number of rows left empty because their tar file is unreadable; training only."""
    source: str = ""
    """Name of the dataset that all its samples are from; evaluation of several only."""

    @property
    def first_sample(self) -> int:
        return self.samples.start


@dataclass(frozen=True)
class StepBatches:
    """The batches of one rank for an optimizer step."""

    step: int
    micro_batches: list[MicroBatch]
    progress: dict[str, float]
    """Number of epochs that each source has completed after this step."""
    wait_seconds: float
    """How long the consumer waited for this step."""


class Loader:
    """Loads the training steps of one data-parallel rank.

    A step has G global samples; rank r takes the r-th contiguous slice of them, in micro-batches of M. A step
    depends only on (stream, M, rank, size), not on `workers` or the step at which the process started.
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
        """micro_size: number of samples in a forward pass. workers: number of prefetching threads; 0 reads on
        demand.
        pin_memory: put batches in page-locked memory, which a GPU copies asynchronously.

        Raise ValueError unless the step size of the stream is a multiple of micro_size · data_size.
        """
        # Check the last segment only: earlier ones may have had other step sizes.
        global_size = stream.timeline.segments[-1].global_size
        if global_size % (micro_size * data_size):
            raise ValueError(
                f"global_size={global_size} is not a multiple of "
                f"micro_size={micro_size} · data_size={data_size}"
            )
        self.stream = stream
        self._collate = collate
        self._micro_size = micro_size
        self._data_rank = data_rank
        self._data_size = data_size
        self._workers = workers
        self._pin_memory = pin_memory

    def steps(self, start_step: int = 0) -> Generator[StepBatches, None, None]:
        """Yield the steps from `start_step` on, without end. Any start is found in constant time.

        Closing or dropping the iterator stops its threads. An error of a thread is raised here, unchanged, at
        its step.
        """
        ended = threading.Event()
        fetched = in_order(lambda step: self._fetch(step, ended), itertools.count(start_step), self._workers)
        try:
            for step in itertools.count(start_step):
                started = time.perf_counter()
                micro_batches = next(fetched)
                waited = time.perf_counter() - started
                yield StepBatches(step, micro_batches, self.stream.progress(step + 1), waited)
        finally:
            # A prefetching thread may be waiting for other ranks, which read no further.
            ended.set()
            fetched.close()

    def _fetch(self, step: int, ended: threading.Event) -> list[MicroBatch]:
        skipped = self.stream.enter(step, ended.is_set)
        samples = self.stream.samples(step)
        share = rank_slice(samples, self._data_rank, self._data_size)
        # Read all micro-batches at once, which amortizes the cost per call.
        origins = self.stream.origins(share, step, skipped)
        raw = self.stream.get(origins)
        keys = self.stream.keys(origins)
        M = self._micro_size
        return [
            self._micro_batch(
                share[i : i + M],
                origins.indices[i : i + M],
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


class Reading(Protocol):
    """Yields the training steps of a run from any step on."""

    def steps(self, start_step: int = 0) -> Iterator[StepBatches]:
        """Return the steps from `start_step` on."""


class OneReading:
    """The steps of a loader, read in several stretches, each from where the one before ended. Threads
    read ahead over their ends."""

    def __init__(self, loader: Loader) -> None:
        self._loader = loader
        self._steps: Generator[StepBatches, None, None] | None = None

    def close(self) -> None:
        """Stop the threads that read ahead."""
        if self._steps is not None:
            self._steps.close()

    def steps(self, start_step: int = 0) -> Iterator[StepBatches]:
        """Return the same iterator each time; `start_step` counts the first time."""
        if self._steps is None:
            self._steps = self._loader.steps(start_step)
        return self._steps


def evaluation_batches(
    dataset: Dataset,
    collate: Collate,
    *,
    micro_size: int,
    data_rank: int = 0,
    data_size: int = 1,
    workers: int = 0,
    max_samples: int | None = None,
    rows: range | None = None,
    pin_memory: bool = False,
) -> Generator[MicroBatch, None, None]:
    """Yield one pass over a dataset in its own order, each sample once over all ranks.

    All ranks get the same number of micro-batches of micro_size rows; rows after the last sample are EMPTY.
    A micro-batch of a Concatenation has samples of one of its datasets only.
    max_samples: use this many samples, evenly spaced, because adjacent samples come from one source.
    rows: use these samples.
    """
    length = len(dataset) if max_samples is None else min(len(dataset), max_samples)
    taken = np.arange(length) * len(dataset) // max(1, length) if rows is None else np.array(rows, np.int64)
    cuts: list[np.ndarray] = [taken]
    if isinstance(dataset, Concatenation):
        cuts = np.split(taken, np.flatnonzero(np.diff(dataset.sources(taken))) + 1)
    parts = [part[i : i + micro_size] for part in cuts for i in range(0, len(part), micro_size)]

    def fetch(number: int) -> MicroBatch:
        part = parts[number] if number < len(parts) else taken[:0]
        indices = np.full(micro_size, EMPTY)
        indices[: len(part)] = part
        raw = {**dataset.get(indices), KEYS: sample_keys(indices, _EVALUATION_KEY)}
        samples = range(number * micro_size, (number + 1) * micro_size)
        source = ""
        if isinstance(dataset, Concatenation) and len(part):
            source = dataset.names[dataset.sources(part[:1])[0]]
        return MicroBatch(_tensors(raw, collate, pin_memory), samples, indices, source=source)

    steps = -(-len(parts) // data_size)
    yield from in_order(fetch, iter(range(data_rank, steps * data_size, data_size)), workers)


def _tensors(raw: dict[str, np.ndarray], collate: Collate, pin_memory: bool) -> Batch:
    batch = collate(raw)
    return {name: tensor.pin_memory() for name, tensor in batch.items()} if pin_memory else batch


def in_order(fetch: Callable[[K], V], keys: Iterable[K], workers: int) -> Generator[V, None, None]:
    """Yield map(fetch, keys), computed ahead by threads; at most workers + 1 results are pending at a
    time."""
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
