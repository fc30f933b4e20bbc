"""How full best fit's rows are, the cost of packing a tar file, and the cost of attention over packed rows.

    OMP_NUM_THREADS=1 python -m tests.bench.packing CORPUS [--sequence-lengths 256 512 1024 2048]

Beside the padding stands what one document a row would leave. The tar file has 100,000 documents of log-
normal lengths. Attention is forward and backward over eight rows of the corpus, 12 heads of 64, against the
same rows as one text each. Times are CPU time, the least of five, taken in turn.
"""

from __future__ import annotations

import argparse
import io
import tarfile
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path

import numpy as np
import torch

from llmtrain.data.datasets.packing import best_fit, count_rows
from llmtrain.nn.attention import attend
from llmtrain.nn.documents import Documents

SHARD_LENGTHS = np.random.default_rng(0).lognormal(5.2, 1.1, 100_000).astype(np.int64) + 1


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("corpus", type=Path)
    parser.add_argument("--sequence-lengths", type=int, nargs="+", default=[256, 512, 1024, 2048])
    options = parser.parse_args()
    tars = [document_lengths(path) for path in sorted(options.corpus.glob("train/*.tar"))]
    tokens = sum(int(lengths.sum()) for lengths in tars)
    print(f"{tokens:,} tokens of {sum(map(len, tars)):,} documents in {len(tars)} tars\n")
    print(f"{'T':>6}{'rows':>9}{'padding %':>11}{'one a row %':>13}{'split %':>9}")
    for T in options.sequence_lengths:
        print_padding(tars, T + 1)
    print(f"\n{SHARD_LENGTHS.sum():,} tokens of {len(SHARD_LENGTHS):,} documents in a shard\n")
    print(f"{'T':>7}{'rows':>9}{'best_fit ms':>13}{'count_rows ms':>15}")
    for T in (512, 1024, 4096, 8192, 131_072):
        fit, count = cpu_ms(*(partial(function, SHARD_LENGTHS, T + 1) for function in (best_fit, count_rows)))
        print(f"{T:>7}{count_rows(SHARD_LENGTHS, T + 1)[0]:>9,}{fit:>13.1f}{count:>15.1f}")

    print(f"\n{'T':>6}{'type':>10}{'tokens a piece':>16}{'one text ms':>13}{'packed ms':>11}{'ratio':>7}")
    for T in options.sequence_lengths:
        for dtype in (torch.float32, torch.bfloat16):
            print_attention(tars[0], T, dtype)


def document_lengths(shard: Path) -> np.ndarray:
    """Tokens of each document of a tar file, in order."""
    with tarfile.open(shard) as tar:
        ends = [np.load(io.BytesIO(tar.extractfile(m).read())) for m in tar if m.name.endswith(".ends.npy")]  # type: ignore[union-attr]
    return np.concatenate([np.diff(sample.astype(np.int64), prepend=0) for sample in ends])


def print_padding(tars: list[np.ndarray], width: int) -> None:
    packed = [best_fit(lengths, width) for lengths in tars]
    rows = sum(map(len, packed))
    held = sum(int(of_tar.lengths.sum()) for of_tar in packed)
    pieces = sum(len(of_tar.lengths) for of_tar in packed)
    padding, apart = (100 * (1 - held / (places * width)) for places in (rows, pieces))
    documents = np.concatenate(tars)
    print(f"{width - 1:>6}{rows:>9,}{padding:>11.3f}{apart:>13.1f}{100 * (documents > width).mean():>9.1f}")


def print_attention(lengths: np.ndarray, T: int, dtype: torch.dtype) -> None:
    packed = best_fit(lengths, T)
    chosen = np.random.default_rng(0).choice(len(packed), 8, replace=False)
    ids_BT = torch.full((8, T), -1)
    pieces = 0
    for row, number in enumerate(chosen):
        held = packed.lengths[packed.first_piece[number] : packed.first_piece[number + 1]]
        ids_BT[row, : held.sum()] = torch.from_numpy(np.repeat(np.arange(len(held)), held))
        pieces += len(held)
    q, k, v, weights = (torch.randn(8, T, 12, 64, dtype=dtype).transpose(1, 2) for _ in range(4))
    inputs = [x.requires_grad_() for x in (q, k, v)]

    def passes(documents: Documents | None) -> None:
        torch.autograd.grad(attend(q, k, v, documents=documents), inputs, weights)

    whole, by_document = cpu_ms(lambda: passes(None), lambda: passes(Documents(ids_BT)))
    name = str(dtype).removeprefix("torch.")
    times = f"{whole:>13.1f}{by_document:>11.1f}{by_document / whole:>7.2f}"
    print(f"{T:>6}{name:>10}{8 * T / pieces:>16.0f}{times}")


def cpu_ms(*functions: Callable[[], object]) -> list[float]:
    """Of each, the least of five, in turn."""
    times: list[list[float]] = [[] for _ in functions]
    for _ in range(5):
        for function, of_function in zip(functions, times, strict=True):
            start = time.process_time()
            function()
            of_function.append(time.process_time() - start)
    return [1000 * min(of_function) for of_function in times]


if __name__ == "__main__":
    main()
