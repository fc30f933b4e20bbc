"""How fast sequences are read, collated and handed to training, and how fast a large corpus opens.

    python -m tests.bench.loader CORPUS [--sequence-length 512] [--micro-size 8]

Prints tokens a second by where the work is done. `processes` is torch's DataLoader over the same
dataset and collate function, the usual alternative to threads. Then the same with a matrix product in
each step: what reading costs a training thread, and what reading ahead hides.
"""

from __future__ import annotations

import argparse
import itertools
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch.utils.data import DataLoader
from torch.utils.data import Dataset as TorchDataset

from llmtrain.data.corpus import Corpus
from llmtrain.data.datasets import TokenSequences
from llmtrain.data.loader import Loader
from llmtrain.data.order import global_samples
from llmtrain.objectives.causal_lm import CausalLM
from tests.support.corpora import random_documents, write_corpus

SECONDS = 2.0
SEED = 0


class Steps(TorchDataset):  # type: ignore[type-arg]
    """One item is one step's batch, for the DataLoader's processes."""

    def __init__(self, dataset: TokenSequences, micro_size: int) -> None:
        self.dataset, self.micro_size = dataset, micro_size

    def __len__(self) -> int:
        return 1 << 30

    def __getitem__(self, step: int) -> dict[str, torch.Tensor]:
        _, indices = global_samples(step, self.micro_size, len(self.dataset), SEED)
        return CausalLM().collate(self.dataset.get(indices))


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
    dataset = TokenSequences(Corpus.open(path).split("train"), sequence_length)
    tokens = sequence_length * micro_size
    print(f"{dataset.describe()}, {micro_size} a step\n{'':>28}  tokens/s")

    counter = iter(range(1 << 30))
    rate = steps_per_second(
        dataset.get(global_samples(k, micro_size, len(dataset), SEED)[1]) for k in counter
    )
    print(f"{'dataset alone':>28}  {rate * tokens:,.0f}")
    for workers in (0, 1, 2):
        loader = Loader(
            dataset,
            CausalLM().collate,
            seed=SEED,
            global_size=micro_size,
            micro_size=micro_size,
            workers=workers,
        )
        print(f"{f'loader, {workers} threads':>28}  {steps_per_second(loader.steps()) * tokens:,.0f}")
    for workers in (1, 2):
        processes = DataLoader(Steps(dataset, micro_size), batch_size=None, num_workers=workers)
        print(f"{f'DataLoader, {workers} processes':>28}  {steps_per_second(iter(processes)) * tokens:,.0f}")

    work = torch.randn(512, 512)
    alone = steps_per_second(itertools.repeat(None), work)
    print(f"\na step that is one matrix product: {alone:,.0f} steps/s; with reading, as a share of it:")
    for workers in (0, 1, 2):
        loader = Loader(
            dataset,
            CausalLM().collate,
            seed=SEED,
            global_size=micro_size,
            micro_size=micro_size,
            workers=workers,
        )
        share = steps_per_second(loader.steps(), work) / alone
        print(f"{f'loader, {workers} threads':>28}  {share:.3f}")


def bench_opening(num_shards: int) -> None:
    with tempfile.TemporaryDirectory() as folder:
        documents = random_documents(num_shards, longest=8)
        path = write_corpus(Path(folder), {"train": documents}, documents_per_sample=1, samples_per_shard=1)
        for verify in ("size", "checksum", "checksum"):
            started = time.perf_counter()
            split = Corpus.open(path, verify).split("train")  # type: ignore[arg-type]
            opened = time.perf_counter() - started
            starts = np.random.default_rng(0).integers(0, split.num_tokens - 4, 1000).tolist()
            started = time.perf_counter()
            for start in starts:
                split.read(start, start + 4)
            read_us = (time.perf_counter() - started) / len(starts) * 1e6
            print(f"{num_shards:,} shards, verify={verify}: open {opened:.3f} s, {read_us:.0f} µs a read")


if __name__ == "__main__":
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("corpus", type=Path)
    parser.add_argument("--sequence-length", type=int, default=512)
    parser.add_argument("--micro-size", type=int, default=8)
    parser.add_argument("--shards", type=int, default=10_000)
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    bench_reading(arguments.corpus, arguments.sequence_length, arguments.micro_size)
    print()
    bench_opening(arguments.shards)
