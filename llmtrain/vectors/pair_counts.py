"""Sums over pairs of words, in bounded memory: sorted runs on the disk, merged by ranges of the first
word."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import numpy as np

PAIR = np.dtype([("key", np.int64), ("value", np.float64)])
"""A pair as first · words + second, and its sum."""


class PairCounts:
    """Adds up values of pairs. At most `most` pairs are held; beyond them they are written, sorted, to
    `folder`, which is emptied at the end of `ranges`."""

    def __init__(self, num_words: int, folder: Path, most: int) -> None:
        self._num_words, self._folder, self._most = num_words, folder, most
        self._keys: list[np.ndarray] = []
        self._values: list[np.ndarray] = []
        self._held = 0
        self._runs: list[Path] = []

    def add(self, first: np.ndarray, second: np.ndarray, value: float) -> None:
        """Add `value` to each pair (first[i], second[i])."""
        if not len(first):
            return
        self._keys.append(first.astype(np.int64) * self._num_words + second)
        self._values.append(np.full(len(first), value))
        self._held += len(first)
        if self._held > self._most:
            self._shrink()
            if self._held > self._most // 2:
                self._write()

    def ranges(self) -> Iterator[tuple[np.ndarray, np.ndarray, np.ndarray]]:
        """Yield (first, second, sum) of all pairs, sorted, in pieces of about `most` pairs at most."""
        if not self._runs:
            self._shrink()
            if self._held:
                yield self._split(self._keys[0], self._values[0])
            return
        if self._held:
            self._shrink()
            self._write()
        runs = [np.memmap(path, PAIR, mode="r") for path in self._runs]
        total = sum(map(len, runs))
        parts = -(-total // self._most) + 1
        # Borders by a sample of the keys, so that ranges have about the same number of pairs.
        sample = np.sort(np.concatenate([run["key"][:: max(1, len(run) // 1000)] for run in runs]))
        borders = sample[np.linspace(0, len(sample) - 1, parts + 1).astype(int)[1:-1]].tolist()
        starts = [0] * len(runs)
        for border in [*dict.fromkeys(borders), np.iinfo(np.int64).max]:
            stops = [int(np.searchsorted(run["key"], border, side="left")) for run in runs]
            pieces = [np.array(run[a:b]) for run, a, b in zip(runs, starts, stops, strict=True)]
            starts = stops
            merged = np.concatenate(pieces)
            if len(merged):
                yield self._split(*summed(merged["key"], merged["value"]))
        del runs
        for path in self._runs:
            path.unlink()

    def _shrink(self) -> None:
        """Make one sorted pair of arrays of what is held."""
        if self._keys:
            keys, values = summed(np.concatenate(self._keys), np.concatenate(self._values))
            self._keys, self._values, self._held = [keys], [values], len(keys)

    def _write(self) -> None:
        run = np.empty(len(self._keys[0]), PAIR)
        run["key"], run["value"] = self._keys[0], self._values[0]
        self._folder.mkdir(parents=True, exist_ok=True)
        self._runs.append(self._folder / f"run-{len(self._runs):05d}.pairs")
        run.tofile(self._runs[-1])
        self._keys, self._values, self._held = [], [], 0

    def _split(self, keys: np.ndarray, values: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        return (keys // self._num_words).astype(np.int32), (keys % self._num_words).astype(np.int32), values


def summed(keys: np.ndarray, values: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Return the different keys, ascending, and the sum of the values of each."""
    order = np.argsort(keys, kind="stable")
    keys, values = keys[order], values[order]
    begins = np.flatnonzero(np.concatenate([[True], keys[1:] != keys[:-1]]))
    return keys[begins], np.add.reduceat(values, begins)
