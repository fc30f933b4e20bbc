"""A figure with its 95 % interval, by bootstrap over rows."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import NamedTuple

import numpy as np

RESAMPLES = 1000
"""Resamples of figures that take little time."""
FEW_RESAMPLES = 200
"""Resamples of figures that take long."""
_SEED = 20_010_508


class Figure(NamedTuple):
    """A value and the 95 % interval that resampled rows give (Efron 1979, the percentile method); NaN where
    it is not defined or was not computed."""

    value: float
    low: float
    high: float

    def __str__(self) -> str:
        if not np.isfinite(self.value):
            return "not defined on these rows"
        known = np.isfinite(self.low)
        return f"{self.value:.4f}" + (f" [{self.low:.4f}, {self.high:.4f}]" if known else "")


def of_samples(value: float, resampled: np.ndarray) -> Figure:
    """Return a figure from its values on resampled rows; those that are not defined do not count."""
    defined = resampled[np.isfinite(resampled)]
    if not len(defined):
        return Figure(float(value), float("nan"), float("nan"))
    low, high = np.quantile(defined, (0.025, 0.975))
    return Figure(float(value), float(low), float(high))


def bootstrap(
    score: Callable[[np.ndarray], Mapping[str, float]], num_rows: int, resamples: int = FEW_RESAMPLES
) -> dict[str, Figure]:
    """Return the figures that `score` gives for the numbers of some rows, of all rows and of resampled
    ones; without resamples the intervals are NaN."""
    whole = score(np.arange(num_rows))
    draw = np.random.default_rng(_SEED)
    found: dict[str, list[float]] = {name: [] for name in whole}
    for _ in range(resamples):
        again = score(draw.integers(0, num_rows, num_rows))
        for name in whole:
            found[name].append(again.get(name, float("nan")))
    return {name: of_samples(value, np.array(found[name])) for name, value in whole.items()}


def ranks(values: np.ndarray) -> np.ndarray:
    """Return the rank of each value from 1, equal values having their mean rank, float64."""
    _, numbers, counts = np.unique(values, return_inverse=True, return_counts=True)
    last = np.cumsum(counts)
    return (last - (counts - 1) / 2)[numbers]


def resampled_counts(counts: np.ndarray, resamples: int = RESAMPLES) -> np.ndarray:
    """Return the counts of each kind of row, (K,), in resamples of all rows: (resamples, K). Rows of a kind
    are alike, so that resampled rows are a multinomial draw."""
    total = int(counts.sum())
    return np.random.default_rng(_SEED).multinomial(total, counts / total, size=resamples)
