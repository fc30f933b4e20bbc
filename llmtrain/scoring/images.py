"""Figures of classifiers of images: accuracy among the likeliest classes, and the worst mistakes.

Dim names: N rows, C classes; H, W, K height, width and channels of a picture.
"""

from __future__ import annotations

import numpy as np

from llmtrain.scoring.figure import RESAMPLES, Figure, of_samples, resampled_counts
from llmtrain.scoring.report import Mistakes

MOST_CLASSES = 100
"""Classes up to which all figures of classification are computed: the areas under their curves take long."""
MOST_MISTAKES = 25


def top_figures(log_NC: np.ndarray, labels_N: np.ndarray, intervals: bool = True) -> dict[str, Figure]:
    """Return "accuracy" and, of more than five classes, "top5_accuracy": the share of rows whose label is the
    likeliest class, or among the five likeliest. log_NC: log-probabilities."""
    of_label_N1 = np.take_along_axis(log_NC, labels_N[:, None], 1)
    # A class that is as likely counts as above the label, so that a constant model is right by chance at
    # most.
    above_N = (log_NC >= of_label_N1).sum(1) - 1
    hits = {"accuracy": log_NC.argmax(1) == labels_N}
    if log_NC.shape[1] > 5:
        hits["top5_accuracy"] = above_N < 5
    return {name: _share(is_hit_N, intervals) for name, is_hit_N in hits.items()}


def _share(is_hit_N: np.ndarray, intervals: bool) -> Figure:
    counts = np.array([is_hit_N.sum(), (~is_hit_N).sum()])
    resampled = resampled_counts(counts, RESAMPLES)[:, 0] / len(is_hit_N) if intervals else np.empty(0)
    return of_samples(float(is_hit_N.mean()), resampled)


def worst_mistakes(
    log_NC: np.ndarray, labels_N: np.ndarray, numbers_N: np.ndarray, pictures_NHWK: np.ndarray | None
) -> Mistakes | None:
    """Return the wrong predictions that gave the label the least probability, the worst first; None without
    one, or without pictures. numbers_N: number of each row among the pictures."""
    if pictures_NHWK is None:
        return None
    of_label_N = np.take_along_axis(log_NC, labels_N[:, None], 1)[:, 0]
    wrong = np.flatnonzero(log_NC.argmax(1) != labels_N)
    worst = wrong[np.argsort(of_label_N[wrong], kind="stable")][:MOST_MISTAKES]
    if not len(worst):
        return None
    predicted = log_NC[worst].argmax(1)
    return Mistakes(
        numbers_N[worst],
        pictures_NHWK[numbers_N[worst]],
        labels_N[worst],
        predicted,
        np.exp(log_NC[worst, predicted]),
    )
