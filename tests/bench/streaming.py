"""Tokens a second of the training stream and of other stream libraries, over the same tokens, in turn.

    pip install 'llmtrain[bench]'
    OMP_NUM_THREADS=1 python -m tests.bench.streaming CORPUS FOLDER [--rounds 5] [--only litdata …]

FOLDER keeps the corpus' training split in each library's format, made at the first run. Each reader has a
process of its own; one runs at a time, and each of theirs is followed at once by ours. Files are in the page
cache, rows are shuffled everywhere, and a reader's first turn is not counted. Ratios are medians over the
rounds, against ours that ran next to it. Rows are what all deliver; training batches, with labels, document
numbers and positions, only ours.
"""

from __future__ import annotations

import argparse
import multiprocessing
import os
import statistics
from concurrent.futures import ProcessPoolExecutor
from contextlib import ExitStack
from pathlib import Path

from tests.bench.stream_formats import FORMATS, OURS, ROWS, tokens_per_second, write_once


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("corpus", type=Path)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--seconds", type=float, default=2.0, help="of each turn")
    parser.add_argument("--sequence-length", type=int, default=512)
    parser.add_argument("--only", nargs="+", choices=list(FORMATS), default=list(FORMATS))
    options = parser.parse_args()
    others = [library for library in options.only if library != OURS]
    width = options.sequence_length + 1

    with ExitStack() as processes:

        def in_own_process() -> ProcessPoolExecutor:
            context = multiprocessing.get_context("spawn")
            return processes.enter_context(ProcessPoolExecutor(max_workers=1, mp_context=context))

        writer = in_own_process()
        folders = {
            library: writer.submit(write_once, library, options.corpus, options.folder, width).result()
            for library in others
        }
        pools = {
            (library, reader): in_own_process()
            for library in [OURS, *others]
            for reader in FORMATS[library].readers
        }

        def measure(library: str, reader: str, seconds: float = options.seconds) -> float:
            asked = pools[library, reader].submit(
                tokens_per_second, library, reader, folders[library], width, seconds
            )
            return asked.result()

        folders[OURS] = options.corpus
        for library, reader in pools:
            measure(library, reader)
        print(f"rows of {width} tokens, load {os.getloadavg()[0]:.2f}\n")
        rates: dict[tuple[str, str], list[float]] = {key: [] for key in pools}
        ratios: dict[tuple[str, str], list[float]] = {key: [] for key in pools}
        for _ in range(options.rounds):
            for key in pools:
                if key == (OURS, ROWS):
                    continue
                rates[key].append(measure(*key))
                rates[OURS, ROWS].append(measure(OURS, ROWS))
                ratios[key].append(rates[OURS, ROWS][-1] / rates[key][-1])
        print(f"{'':<44}{'M tokens/s':>11}{'lowest':>9}{'highest':>9}{'our rows ×':>12}")
        for key, values in rates.items():
            times = f"{statistics.median(ratios[key]):>12.2f}" if ratios[key] else ""
            figures = (statistics.median(values), min(values), max(values))
            shown = f"{figures[0] / 1e6:>11.1f}{figures[1] / 1e6:>9.1f}{figures[2] / 1e6:>9.1f}"
            print(f"{f'{key[0]}: {key[1]}':<44}{shown}{times}")
        print(f"\nload {os.getloadavg()[0]:.2f}")


if __name__ == "__main__":
    main()
