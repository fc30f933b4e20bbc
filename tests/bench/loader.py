"""How fast training batches are read, collated and handed to training, and how long training waits for them.

    OMP_NUM_THREADS=1 python -m tests.bench.loader CORPUS [--sequence-length 512] [--micro-size 8]

Prints tokens a second by where the work is done. `processes` is torch's DataLoader over the same stream and
collate function, the usual alternative to threads. Then the same with a matrix product in each step: what
reading costs a training thread, and what reading ahead hides. Last, real steps of gpt_tiny: the share of
each that training stood still for its data.
"""

from __future__ import annotations

import argparse
import itertools
import os
import statistics
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from torch.utils.data import DataLoader
from torch.utils.data import Dataset as TorchDataset

from llmtrain.corpus.corpus import Corpus
from llmtrain.data.datasets.base import TokenSequences
from llmtrain.data.loader import Loader
from llmtrain.data.mixture import begin
from llmtrain.data.stream import Stream
from llmtrain.engine.allocator import keep_freed_memory
from llmtrain.engine.build import build_engine
from llmtrain.objectives.causal_lm import CausalLM
from llmtrain.train.resolve import resolve
from tests.support.training import compose

SECONDS = 2.0
TRAINING_STEPS = 20


class Steps(TorchDataset):  # type: ignore[type-arg]
    """One item is one step's batch, for the DataLoader's processes."""

    def __init__(self, stream: Stream) -> None:
        self.stream = stream

    def __len__(self) -> int:
        return 1 << 30

    def __getitem__(self, step: int) -> dict[str, torch.Tensor]:
        self.stream.enter(step)
        return CausalLM().collate(self.stream.get(self.stream.origins(self.stream.samples(step), step)))


def open_stream(path: Path, sequence_length: int, global_size: int) -> Stream:
    dataset = TokenSequences(Corpus.open(path).split("train"), sequence_length)
    timeline = begin(global_size, {"corpus": 1.0}, {})
    return Stream({"corpus": dataset}, timeline, seed=0, shuffle_tars=4)


def steps_per_second(steps: Iterator[Any], work: torch.Tensor | None = None) -> float:
    """Steps taken a second after the first, with a matrix product between two when `work` is given."""
    next(steps)
    started, count = time.perf_counter(), 0
    while (elapsed := time.perf_counter() - started) < SECONDS:
        next(steps)
        if work is not None:
            work @ work
        count += 1
    return count / elapsed


def bench_reading(path: Path, sequence_length: int, micro_size: int) -> None:
    stream = open_stream(path, sequence_length, micro_size)
    tokens = sequence_length * micro_size
    print(f"{stream.describe()}, {micro_size} a step\n{'':>28}  tokens/s")
    for workers in (0, 1, 2):
        loader = Loader(stream, CausalLM().collate, micro_size=micro_size, workers=workers)
        print(f"{f'loader, {workers} threads':>28}  {steps_per_second(loader.steps()) * tokens:,.0f}")
    for workers in (1, 2):
        forked = Steps(open_stream(path, sequence_length, micro_size))
        processes = DataLoader(forked, batch_size=None, num_workers=workers)
        print(f"{f'DataLoader, {workers} processes':>28}  {steps_per_second(iter(processes)) * tokens:,.0f}")

    work = torch.randn(512, 512)
    alone = steps_per_second(itertools.repeat(None), work)
    print(f"\na step that is one matrix product: {alone:,.0f} steps/s; with reading, as a share of it:")
    for workers in (0, 1, 2):
        loader = Loader(stream, CausalLM().collate, micro_size=micro_size, workers=workers)
        share = steps_per_second(loader.steps(), work) / alone
        print(f"{f'loader, {workers} threads':>28}  {share:.3f}")


def bench_waiting(path: Path, sequence_length: int, micro_size: int) -> None:
    overrides = ["model=gpt_tiny", f"data.path={path}", f"batch.sequence_length={sequence_length}"]
    overrides += [f"batch.global_size={micro_size}", f"batch.micro_size={micro_size}"]
    resolved = resolve(compose(overrides))
    objective = resolved.config.objective.build(resolved.config.model, resolved.config.data, resolved.corpora)
    engine = build_engine(resolved.config, resolved.layout, torch.device("cpu"), objective, None)
    print(f"\nsteps of gpt_tiny, {micro_size} sequences each: how long they stand still for data")
    for workers in (0, 1, 2):
        stream = open_stream(path, sequence_length, micro_size)
        loader = Loader(stream, objective.collate, micro_size=micro_size, workers=workers)
        waits, times = [], []
        for batches in itertools.islice(loader.steps(), TRAINING_STEPS):
            started = time.perf_counter()
            engine.train_step(batches.micro_batches, lr=1e-4)
            waits.append(batches.wait_seconds)
            times.append(time.perf_counter() - started + batches.wait_seconds)
        # The first step also opens the tar files.
        wait, step = statistics.median(waits[1:]), statistics.median(times[1:])
        share = sum(waits[1:]) / sum(times[1:])
        print(
            f"{f'loader, {workers} threads':>28}  {wait * 1e3:.2f} of {step * 1e3:.0f} ms, {share:.3%} of all"
        )


if __name__ == "__main__":
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("corpus", type=Path)
    parser.add_argument("--sequence-length", type=int, default=512)
    parser.add_argument("--micro-size", type=int, default=8)
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    keep_freed_memory()  # as `llmtrain train` does
    print(f"load {os.getloadavg()[0]:.2f}")
    bench_reading(arguments.corpus, arguments.sequence_length, arguments.micro_size)
    bench_waiting(arguments.corpus, arguments.sequence_length, arguments.micro_size)
