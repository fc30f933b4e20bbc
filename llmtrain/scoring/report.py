"""What single figures leave out: the confusion of classes, the figures of each, and how far probabilities can
be relied on."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

BINS = 15
"""Bins of the calibration error (Guo et al., arXiv:1706.04599)."""
MOST_PRINTED = 12
"""Classes up to which a confusion matrix is printed as text."""
_NAME_CHARACTERS = 20


@dataclass(frozen=True)
class Reliability:
    """Predictions by the probability that was given to them, in bins of equal width."""

    rows: np.ndarray
    """Predictions in each bin, (bins,)."""
    confidence: np.ndarray
    """Sum of their probabilities, (bins,)."""
    correct: np.ndarray
    """How many of them were right, (bins,)."""

    @classmethod
    def of(cls, confidence_N: np.ndarray, correct_N: np.ndarray, bins: int = BINS) -> Reliability:
        """confidence_N: probability of each prediction, correct_N: whether it was right."""
        numbers = np.minimum((confidence_N * bins).astype(np.int64), bins - 1)
        rows = np.bincount(numbers, minlength=bins)
        confidence = np.bincount(numbers, weights=confidence_N, minlength=bins)
        return cls(rows, confidence, np.bincount(numbers, weights=correct_N, minlength=bins))


@dataclass(frozen=True)
class Mistakes:
    """Pictures that were told wrong, the worst first."""

    rows: np.ndarray
    """Number of each in its split, int64 (K,)."""
    pictures: np.ndarray
    """uint8 (K, height, width, channels)."""
    labels: np.ndarray
    predicted: np.ndarray
    """Number of the class, int64 (K,)."""
    confidence: np.ndarray
    """Probability that was given to it, (K,)."""


@dataclass(frozen=True)
class Report:
    """The figures of each class over some rows."""

    names: tuple[str, ...]
    """The classes in the order of their numbers."""
    classes: Mapping[str, Mapping[str, float]]
    """Class, or type of entity → precision, recall, f1 and rows (or entities) of it."""
    matrix: np.ndarray | None = None
    """Rows of each class (row) that were given each class (column), int64 (C, C)."""
    reliability: Reliability | None = None
    mistakes: Mistakes | None = None

    def encode(self) -> dict[str, Any]:
        """Return the report as JSON."""
        found: dict[str, Any] = {"classes": {name: dict(of) for name, of in self.classes.items()}}
        if self.matrix is not None:
            found["confusion_matrix"] = {"labels": list(self.names), "counts": self.matrix.tolist()}
        if self.reliability is not None:
            curve = self.reliability
            found["calibration"] = [
                {
                    "from": number / len(curve.rows),
                    "rows": int(curve.rows[number]),
                    "confidence": float(curve.confidence[number] / curve.rows[number]),
                    "accuracy": float(curve.correct[number] / curve.rows[number]),
                }
                for number in np.flatnonzero(curve.rows).tolist()
            ]
        if self.mistakes is not None:
            worst = self.mistakes
            columns = (worst.rows, worst.labels, worst.predicted, worst.confidence)
            found["worst_mistakes"] = [
                {"row": row, "label": self.names[label], "predicted": self.names[said], "probability": share}
                for row, label, said, share in zip(*(column.tolist() for column in columns), strict=True)
            ]
        return found

    def lines(self) -> Iterator[str]:
        """Yield the confusion matrix as text, if it has few enough classes."""
        if self.matrix is None or not 0 < len(self.names) <= MOST_PRINTED:
            return
        names = [shortened(name) for name in self.names]
        cells = [[f"{count:,}" for count in row] for row in self.matrix.tolist()]
        width = max(map(len, [*names, *(cell for row in cells for cell in row)]))
        first = max(map(len, names))
        yield "confusion matrix: a row for each label, a column for each prediction"
        yield "  ".join([" " * first, *(f"{name:>{width}}" for name in names)])
        for name, row in zip(names, cells, strict=True):
            yield "  ".join([f"{name:<{first}}", *(f"{cell:>{width}}" for cell in row)])


def shortened(name: str) -> str:
    """Return a label as tables and pictures show it."""
    return name if len(name) <= _NAME_CHARACTERS else f"{name[: _NAME_CHARACTERS - 1]}…"


def of_class(hits: int, said: int, there: int) -> dict[str, float]:
    """Return the figures of a class: rows of it that were found, predictions of it, rows of it."""
    return {
        "precision": hits / said if said else 0.0,
        "recall": hits / there if there else 0.0,
        "f1": 2 * hits / (said + there) if said + there else 0.0,
        "rows": there,
    }


def classes_of(matrix: np.ndarray, names: Sequence[str]) -> dict[str, dict[str, float]]:
    """Return the figures of each class of a confusion matrix."""
    hits, said, there = np.diagonal(matrix).tolist(), matrix.sum(0).tolist(), matrix.sum(1).tolist()
    return {name: of_class(hits[c], said[c], there[c]) for c, name in enumerate(names)}
