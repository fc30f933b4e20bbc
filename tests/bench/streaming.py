"""Tokens a second of the training stream and of other stream libraries, over the same tokens, in turn.

    pip install -e . -r tests/bench/requirements.txt       in an environment of its own
    OMP_NUM_THREADS=1 python -m tests.bench.streaming CORPUS FOLDER [--rounds 5] [--only litdata …]

FOLDER keeps the corpus' training split in each library's format, made at the first run. Each reader has a
process of its own; one runs at a time, and each of theirs is followed at once by ours. Files are in the page
cache, rows are shuffled everywhere, and a reader's first turn is not counted. Ratios are medians over the
rounds, against ours that ran next to it; those by CPU time hold where other jobs share the machine. Rows are
what all deliver; training batches, with labels, document numbers and positions, only ours.
"""

from __future__ import annotations

import argparse
import multiprocessing
import os
import statistics
from concurrent.futures import ProcessPoolExecutor
from contextlib import ExitStack
from pathlib import Path

from tests.bench.stream_formats import FORMATS, OURS, ROWS, Turn, take_turn, write_once


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

        def measure(library: str, reader: str) -> Turn:
            asked = (library, reader, folders[library], width, options.seconds)
            return pools[library, reader].submit(take_turn, *asked).result()

        folders[OURS] = options.corpus
        for library, reader in pools:
            measure(library, reader)
        print(f"rows of {width} tokens, load {os.getloadavg()[0]:.2f}\n")
        turns: dict[tuple[str, str], list[Turn]] = {key: [] for key in pools}
        ratios: dict[tuple[str, str], list[tuple[float, float]]] = {key: [] for key in pools}
        for _ in range(options.rounds):
            for key in pools:
                if key == (OURS, ROWS):
                    continue
                theirs, ours = measure(*key), measure(OURS, ROWS)
                turns[key].append(theirs)
                turns[OURS, ROWS].append(ours)
                ratios[key].append((ours.rate / theirs.rate, ours.cpu_rate / theirs.cpu_rate))
        print(f"{'M tokens/s':>55}{'least':>8}{'most':>8}{'a CPU s':>9}{'our rows ×':>12}{'by CPU ×':>10}")
        for key, taken in turns.items():
            rates = [turn.rate / 1e6 for turn in taken]
            cpu_rate = statistics.median(turn.cpu_rate / 1e6 for turn in taken)
            shown = f"{statistics.median(rates):>11.1f}{min(rates):>8.1f}{max(rates):>8.1f}{cpu_rate:>9.1f}"
            if ratios[key]:
                wall, cpu = (statistics.median(column) for column in zip(*ratios[key], strict=True))
                shown += f"{wall:>12.2f}{cpu:>10.2f}"
            print(f"{f'{key[0]}: {key[1]}':<44}{shown}")
        print(f"\nload {os.getloadavg()[0]:.2f}")


if __name__ == "__main__":
    main()
