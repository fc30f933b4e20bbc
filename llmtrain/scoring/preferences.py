"""Figures of preferences: how often a chosen answer gains on the rejected one, and by how much."""

from __future__ import annotations

import numpy as np

from llmtrain.scoring.figure import RESAMPLES, Figure, bootstrap

PREFERENCE_FIGURES = ("accuracy", "margin")


def preference_figures(margins_N: np.ndarray, intervals: bool = True) -> dict[str, Figure]:
    """Return the figures of the margin of each pair."""

    def of_rows(rows: np.ndarray) -> dict[str, float]:
        margins = margins_N[rows].astype(np.float64)
        return {"accuracy": float((margins > 0).mean()), "margin": float(margins.mean())}

    return bootstrap(of_rows, len(margins_N), RESAMPLES if intervals else 0)
