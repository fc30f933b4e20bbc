import hashlib
import itertools
import threading
import time
from collections.abc import Callable

import numpy as np
import pytest
import torch

from llmtrain.data.datasets.base import EMPTY, Concatenation
from llmtrain.data.loader import Loader, evaluation_batches
from llmtrain.data.mixture import begin
from llmtrain.data.stream import Stream

G, M = 8, 2


class Numbers:
    """A sample is its own number."""

    fingerprint = "00"

    def __init__(self, length: int, broken: int | None = None) -> None:
        self.length = length
        self.broken = broken
        self.read: list[int] = []

    def __len__(self) -> int:
        return self.length

    @property
    def tar_sizes(self) -> np.ndarray:
        return np.array([self.length])

    def get(self, indices: np.ndarray) -> dict[str, np.ndarray]:
        self.read += indices.tolist()
        if self.broken in indices:
            raise OSError(f"sample {self.broken} cannot be read")
        # Late threads must not overtake early ones.
        time.sleep(0.001 * (int(indices[0]) % 3))
        return {"numbers": indices.astype(np.int64)}

    def describe(self) -> str:
        return f"{self.length} numbers"


def collate(raw: dict[str, np.ndarray]) -> dict[str, torch.Tensor]:
    return {"numbers": torch.from_numpy(raw["numbers"])}


def loader(dataset: Numbers, global_size: int = G, **options) -> Loader:
    stream = Stream({"": dataset}, begin(global_size, {"": 1.0}, {}), seed=5, shuffle_tars=4)
    return Loader(stream, collate, **({"micro_size": M} | options))


def consumed(num_steps: int, start_step: int = 0, data_size: int = 1, workers: int = 0) -> list[list[int]]:
    """Dataset numbers of each step, put together from all ranks."""
    ranks = [
        loader(Numbers(27), data_rank=rank, data_size=data_size, workers=workers).steps(start_step)
        for rank in range(data_size)
    ]
    steps = []
    for step in range(start_step, start_step + num_steps):
        parts = [next(rank) for rank in ranks]
        assert [part.step for part in parts] == [step] * data_size
        micro_batches = [micro for part in parts for micro in part.micro_batches]
        assert all(len(micro.samples) == M for micro in micro_batches)
        assert [n for micro in micro_batches for n in micro.samples] == list(range(step * G, (step + 1) * G))
        assert {part.progress["epoch"] for part in parts} == {(step + 1) * G / 27}
        for micro in micro_batches:
            assert micro.first_sample == micro.samples[0]
            assert micro.batch["numbers"].tolist() == micro.indices.tolist()
        steps.append([n for micro in micro_batches for n in micro.indices.tolist()])
    for rank in ranks:
        rank.close()
    return steps


def digest(steps: list[list[int]]) -> str:
    return hashlib.sha256(repr(steps).encode()).hexdigest()


def test_the_stream_is_one_whatever_the_ranks_and_workers():
    streams = {
        digest(consumed(12, data_size=data_size, workers=workers))
        for data_size, workers in itertools.product((1, 2, 4), (0, 1, 2, 5))
    }
    assert len(streams) == 1


def test_every_epoch_covers_everything():
    numbers = [n for step in consumed(27) for n in step]
    for epoch in range(8):
        assert sorted(numbers[epoch * 27 : (epoch + 1) * 27]) == list(range(27))
    assert numbers[:27] != numbers[27:54]


@pytest.mark.parametrize("workers", [0, 2])
@pytest.mark.parametrize("data_size", [1, 2])
def test_resuming_equals_going_on(data_size: int, workers: int):
    assert consumed(12)[5:] == consumed(7, start_step=5, data_size=data_size, workers=workers)


@pytest.mark.parametrize("workers", [0, 2])
def test_resuming_reads_nothing_of_what_went_before(workers: int):
    dataset = Numbers(10**9)
    steps = loader(dataset, workers=workers).steps(10**8)
    next(steps)
    steps.close()
    assert len(dataset.read) <= G * (workers + 2)


@pytest.mark.parametrize(("global_size", "micro_size", "data_size"), [(8, 3, 1), (6, 2, 2), (8, 4, 4)])
def test_sizes_that_do_not_divide(global_size: int, micro_size: int, data_size: int):
    with pytest.raises(ValueError, match="is not a multiple of micro_size"):
        loader(Numbers(9), global_size=global_size, micro_size=micro_size, data_size=data_size)


def loader_threads() -> list[threading.Thread]:
    return [thread for thread in threading.enumerate() if thread.name.startswith("loader")]


@pytest.mark.parametrize("workers", [0, 2])
def test_a_reader_s_error_arrives_as_itself_at_its_step(workers: int):
    order = consumed(4)
    dataset = Numbers(27, broken=order[3][0])
    steps = loader(dataset, workers=workers).steps()
    # An epoch is 27 samples, so the first 24 are all different.
    for _ in range(3):
        next(steps)
    with pytest.raises(OSError, match="cannot be read"):
        next(steps)
    assert loader_threads() == []


def test_closing_or_dropping_stops_the_threads():
    for stop in ("close", "drop"):
        steps = loader(Numbers(27), workers=3).steps()
        next(steps)
        # A pool starts no new thread while one is idle.
        assert 1 <= len(loader_threads()) <= 3
        if stop == "close":
            steps.close()
        del steps
        assert loader_threads() == []


def wait_until(condition: Callable[[], bool]) -> None:
    deadline = time.monotonic() + 30
    while not condition() and time.monotonic() < deadline:
        time.sleep(0.005)


def test_reading_ahead_is_bounded():
    dataset = Numbers(10_000)
    steps = loader(dataset, workers=2).steps()
    next(steps)
    # One step is taken, three wait.
    wait_until(lambda: len(dataset.read) >= 4 * G)
    time.sleep(0.1)
    assert len(dataset.read) == 4 * G
    steps.close()


def test_waiting_is_measured():
    class Slow(Numbers):
        def get(self, indices: np.ndarray) -> dict[str, np.ndarray]:
            time.sleep(0.4)
            return super().get(indices)

    direct = loader(Slow(100)).steps()
    assert next(direct).wait_seconds >= 0.3
    dataset = Slow(100)
    ahead = loader(dataset, workers=2).steps()
    next(ahead)
    wait_until(lambda: len(dataset.read) >= 4 * G)
    assert next(ahead).wait_seconds < 0.3
    ahead.close()


@pytest.mark.parametrize("workers", [0, 2])
@pytest.mark.parametrize(("length", "data_size"), [(1, 1), (1, 4), (7, 2), (8, 2), (9, 2), (27, 4), (26, 1)])
def test_evaluation_takes_each_sample_once_and_equally_many_batches(
    length: int, data_size: int, workers: int
):
    ranks = [
        list(
            evaluation_batches(
                Numbers(length), collate, micro_size=M, data_rank=rank, data_size=data_size, workers=workers
            )
        )
        for rank in range(data_size)
    ]
    assert len({len(batches) for batches in ranks}) == 1
    assert len(ranks[0]) == -(-length // (M * data_size))
    in_order = [
        n for batches in zip(*ranks, strict=True) for micro in batches for n in micro.indices.tolist()
    ]
    assert in_order == [*range(length), *[EMPTY] * (len(in_order) - length)]


@pytest.mark.parametrize("data_size", [1, 2, 3])
@pytest.mark.parametrize("max_samples", [None, 9])
def test_a_batch_of_an_evaluation_is_of_one_corpus(data_size: int, max_samples: int | None):
    parts = {"a": Numbers(5), "b": Numbers(1), "c": Numbers(14)}
    mixture = Concatenation(parts)
    ranks = [
        list(
            evaluation_batches(
                mixture, collate, micro_size=4, data_rank=rank, data_size=data_size, max_samples=max_samples
            )
        )
        for rank in range(data_size)
    ]
    assert len({len(batches) for batches in ranks}) == 1
    taken: list[int] = []
    for micro in [micro for batches in zip(*ranks, strict=True) for micro in batches]:
        numbers = micro.indices[micro.indices != EMPTY]
        assert {"abc"[source] for source in mixture.sources(numbers)} <= {micro.source}
        taken += numbers.tolist()
    alone = evaluation_batches(Numbers(20), collate, micro_size=4, max_samples=max_samples)
    assert taken == [n for micro in alone for n in micro.indices.tolist() if n != EMPTY]


def test_a_shortened_evaluation_is_spread_over_the_dataset():
    def taken(max_samples: int) -> list[int]:
        batches = evaluation_batches(Numbers(100), collate, micro_size=4, max_samples=max_samples)
        return [n for micro in batches for n in micro.indices.tolist()]

    assert taken(4) == [0, 25, 50, 75]
    assert taken(6) == [0, 16, 33, 50, 66, 83, EMPTY, EMPTY]
    assert taken(1000) == list(range(100))
