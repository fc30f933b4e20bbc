"""Word vectors in two dimensions: by principal components or t-SNE, as a picture, and as files of
TensorBoard's projector."""

from __future__ import annotations

import io
from collections.abc import Sequence
from pathlib import Path

import numpy as np

from llmtrain import files

MOST_TSNE = 5000
"""Most words of a map by t-SNE, whose time and memory grow by their square."""
_ITERATIONS, _EARLY, _EXAGGERATION, _STEP = 750, 250, 12.0, 200.0


def principal_components(matrix: np.ndarray, count: int = 2) -> np.ndarray:
    """Return the coordinates (words, count) along the directions of largest variance; the largest coordinate
    of each direction is positive."""
    centered = np.asarray(matrix, np.float64) - np.mean(matrix, axis=0, dtype=np.float64)
    _, _, directions = np.linalg.svd(centered, full_matrices=False)
    count = min(count, len(directions))
    found = centered @ directions[:count].T
    largest = found[np.abs(found).argmax(axis=0), np.arange(count)]
    return np.asarray(found * np.where(largest < 0, -1, 1))


def tsne(matrix: np.ndarray, perplexity: float) -> np.ndarray:
    """Return t-SNE coordinates, (words, 2) (van der Maaten and Hinton 2008), which start from the principal
    components, so that equal vectors give equal maps."""
    shares = joint_probabilities(np.asarray(matrix, np.float64), perplexity)
    at = principal_components(matrix)
    at = at / max(float(np.std(at[:, 0])), 1e-12) * 1e-4
    speed, gain = np.zeros_like(at), np.ones_like(at)
    step = max(_STEP, len(at) / _EXAGGERATION / 4)
    for iteration in range(_ITERATIONS):
        exaggeration, momentum = (_EXAGGERATION, 0.5) if iteration < _EARLY else (1.0, 0.8)
        gradient = _gradient(at, shares * exaggeration)
        same = np.sign(gradient) == np.sign(speed)
        gain = np.maximum(np.where(same, gain * 0.8, gain + 0.2), 0.01)
        speed = momentum * speed - step * gain * gradient
        at = at + speed
    return np.asarray(at - at.mean(axis=0))


def _gradient(at: np.ndarray, shares: np.ndarray) -> np.ndarray:
    near = 1 / (1 + squared_distances(at))
    np.fill_diagonal(near, 0)
    pull = (shares - near / near.sum()) * near
    return np.asarray(4 * (pull.sum(axis=1)[:, None] * at - pull @ at))


def divergence(at: np.ndarray, shares: np.ndarray) -> float:
    """Return the loss of t-SNE: the Kullback–Leibler divergence of the map from the joint
    probabilities."""
    near = 1 / (1 + squared_distances(at))
    np.fill_diagonal(near, 0)
    other = np.maximum(near / near.sum(), 1e-12)
    return float((shares * np.log(np.maximum(shares, 1e-12) / other)).sum())


def joint_probabilities(matrix: np.ndarray, perplexity: float) -> np.ndarray:
    """Return the symmetric probabilities of pairs, (words, words), whose rows have this perplexity."""
    distance = squared_distances(matrix)
    np.fill_diagonal(distance, np.inf)
    low, high = np.zeros(len(matrix)), np.full(len(matrix), np.inf)
    precision = 1 / np.maximum(np.where(np.isfinite(distance), distance, 0).mean(axis=1), 1e-12)
    for _ in range(64):  # bisection of each word's precision
        weight = np.exp(-(distance - distance.min(axis=1, keepdims=True)) * precision[:, None])
        share = weight / weight.sum(axis=1, keepdims=True)
        entropy = -(share * np.log(np.maximum(share, 1e-300))).sum(axis=1)
        is_wide = entropy > np.log(perplexity)
        low, high = np.where(is_wide, precision, low), np.where(is_wide, high, precision)
        precision = np.where(np.isinf(high), precision * 2, (low + high) / 2)
    return np.asarray((share + share.T) / (2 * len(matrix)))


def squared_distances(matrix: np.ndarray) -> np.ndarray:
    squares = (matrix * matrix).sum(axis=1)
    return np.maximum(squares[:, None] + squares[None] - 2 * matrix @ matrix.T, 0)


def draw(words: Sequence[str], at: np.ndarray, title: str) -> bytes:
    """Return a PNG of the words at their coordinates."""
    from matplotlib.figure import Figure

    size = min(20.0, max(7.0, len(words) ** 0.5))
    figure = Figure(figsize=(size, size * 0.8), layout="constrained")
    axes = figure.add_subplot()
    axes.scatter(at[:, 0], at[:, 1], s=8, color="tab:blue", alpha=0.5)
    for word, (x, y) in zip(words, at, strict=True):
        # A dollar sign would begin a formula.
        axes.annotate(word.replace("$", r"\$"), (x, y), fontsize=7, xytext=(2, 2), textcoords="offset points")
    axes.set(title=title, xticks=[], yticks=[])
    png = io.BytesIO()
    figure.savefig(png, format="png", dpi=120)
    return png.getvalue()


def write_projector(folder: Path, words: Sequence[str], matrix: np.ndarray) -> None:
    """Write what TensorBoard's projector reads of a log folder: `tensorboard --logdir FOLDER`. Raise OSError
    if it cannot be written."""
    folder.mkdir(parents=True, exist_ok=True)
    rows = ("\t".join(f"{x:.6g}" for x in row) for row in np.asarray(matrix, np.float32))
    files.write_atomically(folder / "vectors.tsv", "\n".join(rows) + "\n")
    files.write_atomically(folder / "metadata.tsv", "\n".join(map(_one_line, words)) + "\n")
    config = 'embeddings {\n  tensor_path: "vectors.tsv"\n  metadata_path: "metadata.tsv"\n}\n'
    files.write_atomically(folder / "projector_config.pbtxt", config)


def _one_line(word: str) -> str:
    return " ".join(word.split()) or "(empty)"
