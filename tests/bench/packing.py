"""How full best fit's rows are, what padding one document a row would leave, and what packing a shard costs.

    OMP_NUM_THREADS=1 python -m tests.bench.packing CORPUS [--sequence-lengths 256 512 1024 2048]

Then the time of one large shard, 100,000 documents of log-normal lengths: CPU time, the least of five.
"""

from __future__ import annotations

import argparse
import io
import tarfile
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np

from llmtrain.data.packing import best_fit, count_rows

SHARD_LENGTHS = np.random.default_rng(0).lognormal(5.2, 1.1, 100_000).astype(np.int64) + 1


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("corpus", type=Path)
    parser.add_argument("--sequence-lengths", type=int, nargs="+", default=[256, 512, 1024, 2048])
    options = parser.parse_args()
    shards = [document_lengths(path) for path in sorted(options.corpus.glob("train/*.tar"))]
    tokens = sum(int(lengths.sum()) for lengths in shards)
    print(f"{tokens:,} tokens of {sum(map(len, shards)):,} documents in {len(shards)} shards\n")
    print(f"{'T':>6}{'rows':>9}{'padding %':>11}{'one a row %':>13}{'split %':>9}")
    for T in options.sequence_lengths:
        print_padding(shards, T + 1)
    print(f"\n{SHARD_LENGTHS.sum():,} tokens of {len(SHARD_LENGTHS):,} documents in a shard\n")
    print(f"{'T':>7}{'rows':>9}{'best_fit ms':>13}{'count_rows ms':>15}")
    for T in (512, 1024, 4096, 8192, 131_072):
        fit, count = (cpu_ms(function, SHARD_LENGTHS, T + 1) for function in (best_fit, count_rows))
        print(f"{T:>7}{count_rows(SHARD_LENGTHS, T + 1)[0]:>9,}{fit:>13.1f}{count:>15.1f}")


def document_lengths(shard: Path) -> np.ndarray:
    """Tokens of each document of a shard, in order."""
    with tarfile.open(shard) as tar:
        ends = [np.load(io.BytesIO(tar.extractfile(m).read())) for m in tar if m.name.endswith(".ends.npy")]  # type: ignore[union-attr]
    return np.concatenate([np.diff(sample.astype(np.int64), prepend=0) for sample in ends])


def print_padding(shards: list[np.ndarray], width: int) -> None:
    packed = [best_fit(lengths, width) for lengths in shards]
    rows = sum(map(len, packed))
    held = sum(int(of_shard.lengths.sum()) for of_shard in packed)
    pieces = sum(len(of_shard.lengths) for of_shard in packed)
    padding, apart = (100 * (1 - held / (places * width)) for places in (rows, pieces))
    documents = np.concatenate(shards)
    print(f"{width - 1:>6}{rows:>9,}{padding:>11.3f}{apart:>13.1f}{100 * (documents > width).mean():>9.1f}")


def cpu_ms(function: Callable[[np.ndarray, int], object], lengths: np.ndarray, width: int) -> float:
    times = []
    for _ in range(5):
        start = time.process_time()
        function(lengths, width)
        times.append(time.process_time() - start)
    return 1000 * min(times)


if __name__ == "__main__":
    main()
