"""Figures of generated images, from the features that a classifier sees in them.

Dim names: N images, D features.
"""

from __future__ import annotations

import numpy as np

from llmtrain.scoring.figure import Figure


def sample_figures(rows: np.ndarray, num_classes: int) -> dict[str, Figure]:
    """Return "frechet_distance" and "classes_met", the share of `num_classes` that some generated image is
    of.

    rows: features of a real image, of a generated one, and the class of the latter, (N, 2·D + 1).
    """
    D = rows.shape[1] // 2
    distance = frechet_distance(rows[:, :D], rows[:, D : 2 * D])
    met = len(np.unique(rows[:, -1])) / num_classes
    unknown = float("nan")
    return {
        "frechet_distance": Figure(distance, unknown, unknown),
        "classes_met": Figure(min(1.0, met), unknown, unknown),
    }


def frechet_distance(real_ND: np.ndarray, made_ND: np.ndarray) -> float:
    """Return |m₁ − m₂|² + tr(C₁ + C₂ − 2 (C₁ C₂)^½) of the means and covariances of features (Heusel et al.
    2017, arXiv:1706.08500, section 4, whose features are those of another network). 0 for equal
    distributions; with N below D it is too large, but comparable at equal N."""
    means = [features.mean(0, dtype=np.float64) for features in (real_ND, made_ND)]
    covariances = [np.atleast_2d(np.cov(f.astype(np.float64), rowvar=False)) for f in (real_ND, made_ND)]
    values, vectors = np.linalg.eigh(covariances[0])
    root = (vectors * np.sqrt(np.clip(values, 0, None))) @ vectors.T
    # C₁ C₂ has the eigenvalues of C₁^½ C₂ C₁^½, which is symmetric.
    of_product = np.linalg.eigvalsh(root @ covariances[1] @ root)
    trace = (
        np.trace(covariances[0]) + np.trace(covariances[1]) - 2 * np.sqrt(np.clip(of_product, 0, None)).sum()
    )
    return float(max(0.0, ((means[0] - means[1]) ** 2).sum() + trace))
