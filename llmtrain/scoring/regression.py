"""Figures of regression: Pearson's and Spearman's correlation, and the errors."""

from __future__ import annotations

import numpy as np

from llmtrain.scoring.figure import FEW_RESAMPLES, Figure, bootstrap, ranks

FIGURES = ("pearson", "spearman", "mean_squared_error", "mean_absolute_error")


def value_figures(predicted_N: np.ndarray, truth_N: np.ndarray, intervals: bool = True) -> dict[str, Figure]:
    """Return the figures of one number a row. A correlation with numbers that do not vary is NaN."""

    def of_rows(rows: np.ndarray) -> dict[str, float]:
        predicted, truth = predicted_N[rows], truth_N[rows]
        return {
            "pearson": _correlation(predicted, truth),
            "spearman": _correlation(ranks(predicted), ranks(truth)),
            "mean_squared_error": float(np.square(predicted - truth).mean()),
            "mean_absolute_error": float(np.abs(predicted - truth).mean()),
        }

    return bootstrap(of_rows, len(truth_N), FEW_RESAMPLES if intervals else 0)


def _correlation(a: np.ndarray, b: np.ndarray) -> float:
    """Return Pearson's correlation, NaN where one of the two does not vary."""
    # By the values: rounding leaves a constant column a deviation.
    if np.ptp(a) == 0 or np.ptp(b) == 0:
        return float("nan")
    return float(np.corrcoef(a, b)[0, 1])
