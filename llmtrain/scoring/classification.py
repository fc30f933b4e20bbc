"""Figures of classification: from the probabilities of each class and the labels.

Dim names: N rows, C classes, R resamples.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from llmtrain.scoring.figure import (
    FEW_RESAMPLES,
    RESAMPLES,
    Figure,
    bootstrap,
    of_samples,
    ranks,
    resampled_counts,
)
from llmtrain.scoring.report import BINS, Mistakes, Reliability, Report, classes_of, of_class

CLASS_FIGURES = (
    *("accuracy", "f1_macro", "balanced_accuracy", "precision_macro", "recall_macro"),
    *("precision_micro", "recall_micro", "f1_micro", "precision_weighted", "recall_weighted", "f1_weighted"),
    *("matthews", "roc_auc", "calibration_error"),
)
"""Figures of one label a row."""
LABEL_FIGURES = (
    *("f1_micro", "f1_macro", "exact_accuracy", "precision_macro", "recall_macro"),
    *("precision_micro", "recall_micro", "precision_weighted", "recall_weighted", "f1_weighted", "roc_auc"),
)
"""Figures of any number of labels a row."""
_LARGEST_CHUNK = 1 << 22
"""Cells of confusion matrices that are held at once."""


def confusion(predicted_N: np.ndarray, labels_N: np.ndarray, num_classes: int) -> np.ndarray:
    """Return how many rows of each label (row) were given each class (column), int64 (C, C)."""
    cells = np.bincount(labels_N * num_classes + predicted_N, minlength=num_classes**2)
    return cells.reshape(num_classes, num_classes)


def class_figures(
    probabilities_NC: np.ndarray, labels_N: np.ndarray, intervals: bool = True
) -> dict[str, Figure]:
    """Return the figures of one label a row: accuracy, balanced accuracy, precision, recall and F1 (macro,
    micro, weighted), Matthews' coefficient, the area under the ROC curve, and the calibration error."""
    C = probabilities_NC.shape[1]
    predicted_N = probabilities_NC.argmax(1)
    matrix = confusion(predicted_N, labels_N, C)
    whole = _of_matrices(matrix[None])
    resampled = _resampled(matrix, RESAMPLES if intervals else 0)
    figures = {name: of_samples(values[0], resampled[name]) for name, values in whole.items()}
    confidence_N, correct_N = probabilities_NC.max(1), predicted_N == labels_N

    def of_rows(rows: np.ndarray) -> dict[str, float]:
        return {
            "roc_auc": _area(probabilities_NC[rows], labels_N[rows]),
            "calibration_error": calibration_error(confidence_N[rows], correct_N[rows]),
        }

    figures |= bootstrap(of_rows, len(labels_N), FEW_RESAMPLES if intervals else 0)
    return {name: figures[name] for name in CLASS_FIGURES}


def class_report(
    probabilities_NC: np.ndarray,
    labels_N: np.ndarray,
    names: Sequence[str],
    mistakes: Mistakes | None = None,
) -> Report:
    """Return the confusion matrix, the figures of each class, the reliability of the probability of the label
    that is predicted, and the mistakes that are given."""
    predicted_N = probabilities_NC.argmax(1)
    matrix = confusion(predicted_N, labels_N, len(names))
    curve = Reliability.of(probabilities_NC.max(1), predicted_N == labels_N)
    return Report(tuple(names), classes_of(matrix, names), matrix, curve, mistakes)


def label_figures(
    probabilities_NC: np.ndarray, labels_NC: np.ndarray, intervals: bool = True
) -> dict[str, Figure]:
    """Return the figures of any number of labels a row, each predicted from a probability of a half on:
    accuracy of all labels of a row together, precision, recall and F1 (macro, micro, weighted), and the area
    under the ROC curve of each label, averaged."""
    predicted_NC, truth_NC = probabilities_NC >= 0.5, labels_NC > 0.5

    def of_rows(rows: np.ndarray) -> dict[str, float]:
        predicted, truth = predicted_NC[rows], truth_NC[rows]
        hits, said, there = (predicted & truth).sum(0), predicted.sum(0), truth.sum(0)
        areas = [_area_of(probabilities_NC[rows, c], truth[:, c]) for c in range(truth.shape[1])]
        known = [area for area in areas if np.isfinite(area)]
        found = {
            "exact_accuracy": float((predicted == truth).all(1).mean()),
            "roc_auc": float(np.mean(known)) if known else float("nan"),
        }
        averages = {
            "precision": (_ratio(hits, said), _ratio(hits.sum(), said.sum())),
            "recall": (_ratio(hits, there), _ratio(hits.sum(), there.sum())),
            "f1": (_ratio(2 * hits, said + there), _ratio(2 * hits.sum(), said.sum() + there.sum())),
        }
        for name, (of_labels, micro) in averages.items():
            found[f"{name}_macro"], found[f"{name}_micro"] = float(of_labels.mean()), float(micro)
            found[f"{name}_weighted"] = float(_ratio((of_labels * there).sum(), there.sum()))
        return {name: found[name] for name in LABEL_FIGURES}

    return bootstrap(of_rows, len(labels_NC), FEW_RESAMPLES if intervals else 0)


def label_report(probabilities_NC: np.ndarray, labels_NC: np.ndarray, names: Sequence[str]) -> Report:
    """Return the figures of each label, and the reliability of the probabilities of all labels."""
    predicted_NC, truth_NC = probabilities_NC >= 0.5, labels_NC > 0.5
    hits, said, there = (predicted_NC & truth_NC).sum(0), predicted_NC.sum(0), truth_NC.sum(0)
    classes = {name: of_class(int(hits[c]), int(said[c]), int(there[c])) for c, name in enumerate(names)}
    curve = Reliability.of(probabilities_NC.reshape(-1), truth_NC.reshape(-1))
    return Report(tuple(names), classes, None, curve)


def calibration_error(confidence_N: np.ndarray, correct_N: np.ndarray, bins: int = BINS) -> float:
    """Return the expected calibration error: the mean distance of confidence and accuracy over bins of equal
    width, weighted by their rows (arXiv:1706.04599, equation 3)."""
    found = Reliability.of(confidence_N, correct_N, bins)
    return float(np.abs(found.confidence - found.correct).sum() / len(confidence_N))


def _resampled(matrix: np.ndarray, resamples: int) -> dict[str, np.ndarray]:
    """Return the figures of the confusion matrices of resampled rows, each (resamples,)."""
    C = len(matrix)
    filled = np.flatnonzero(matrix)
    counts = resampled_counts(matrix.reshape(-1)[filled], resamples)
    at_once = max(1, _LARGEST_CHUNK // C**2)
    parts = []
    for start in range(0, max(1, resamples), at_once):
        chunk = counts[start : start + at_once]
        matrices = np.zeros((len(chunk), C * C), np.int64)
        matrices[:, filled] = chunk
        parts.append(_of_matrices(matrices.reshape(-1, C, C)))
    return {name: np.concatenate([part[name] for part in parts]) for name in parts[0]}


def _of_matrices(matrices_RCC: np.ndarray) -> dict[str, np.ndarray]:
    """Return the figures that confusion matrices give, each (R,). Classes without a row of their own and
    without a prediction do not count in the averages over classes, as in scikit-learn."""
    matrices = matrices_RCC.astype(np.float64)
    hits_RC = np.diagonal(matrices, axis1=1, axis2=2)
    there_RC, said_RC = matrices.sum(2), matrices.sum(1)
    total_R = matrices.sum((1, 2))
    precision, recall = _ratio(hits_RC, said_RC), _ratio(hits_RC, there_RC)
    f1 = _ratio(2 * hits_RC, said_RC + there_RC)
    is_seen, has_rows = said_RC + there_RC > 0, there_RC > 0
    hits_R = hits_RC.sum(1)
    # Gorodkin 2004, equation 8; for two classes it is Matthews 1975.
    covariance = hits_R * total_R - (said_RC * there_RC).sum(1)
    spread = (total_R**2 - (said_RC**2).sum(1)) * (total_R**2 - (there_RC**2).sum(1))
    return {
        "accuracy": hits_R / total_R,
        "precision_micro": hits_R / total_R,
        "recall_micro": hits_R / total_R,
        "precision_weighted": (precision * there_RC).sum(1) / total_R,
        "recall_weighted": (recall * there_RC).sum(1) / total_R,
        "balanced_accuracy": _mean(recall, has_rows),
        "precision_macro": _mean(precision, is_seen),
        "recall_macro": _mean(recall, is_seen),
        "f1_macro": _mean(f1, is_seen),
        "f1_micro": hits_R / total_R,
        "f1_weighted": (f1 * there_RC).sum(1) / total_R,
        "matthews": _ratio(covariance, np.sqrt(spread)),
    }


def _ratio(a: np.ndarray, b: np.ndarray) -> np.ndarray:
    """Return a / b, 0 where b is 0."""
    return np.divide(a, b, out=np.zeros(np.broadcast(a, b).shape), where=np.asarray(b) > 0)


def _mean(values_RC: np.ndarray, counts_RC: np.ndarray) -> np.ndarray:
    """Return the mean over the classes that count, (R,)."""
    return _ratio((values_RC * counts_RC).sum(1), counts_RC.sum(1).astype(np.float64))


def _area(probabilities_NC: np.ndarray, labels_N: np.ndarray) -> float:
    """Return the area under the ROC curve: of the second of two classes, else of each class against the
    others, averaged. NaN where a class has no row."""
    C = probabilities_NC.shape[1]
    classes = [1] if C == 2 else range(C)
    return float(np.mean([_area_of(probabilities_NC[:, c], labels_N == c) for c in classes]))


def _area_of(scores_N: np.ndarray, is_positive_N: np.ndarray) -> float:
    """Return the probability that a positive row has the higher score (Mann and Whitney 1947), a tie counting
    half."""
    positives = int(is_positive_N.sum())
    negatives = len(is_positive_N) - positives
    if not positives or not negatives:
        return float("nan")
    rank_sum = float(ranks(scores_N)[is_positive_N].sum())
    return (rank_sum - positives * (positives + 1) / 2) / (positives * negatives)
