"""Heads over vectors equal those of scikit-learn."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from sklearn.linear_model import LogisticRegression, Ridge
from sklearn.preprocessing import StandardScaler

from llmtrain.features.config import FeaturesConfig
from llmtrain.features.minimize import minimize
from llmtrain.features.path import PATIENCE, solve_head
from llmtrain.features.solver import Solver
from llmtrain.nn.task_config import TaskHeadConfig

N, D = 400, 12
TOLERANCE = 2e-3
"""Of probabilities: both solvers stop short of the minimum, in fp32 here."""


def vectors(seed: int = 0) -> np.ndarray:
    """Correlated, of very different sizes, with a mean that is not 0, and one that is constant."""
    draw = np.random.default_rng(seed)
    mixed = draw.normal(size=(N, D)) @ (draw.normal(size=(D, D)) * np.logspace(0, -1.5, D))
    return np.concatenate([mixed + 3 * draw.normal(size=D), np.full((N, 1), 0.1)], 1).astype(np.float32)


def classes(rows: np.ndarray, count: int) -> np.ndarray:
    draw = np.random.default_rng(1)
    logits = StandardScaler().fit_transform(rows) @ draw.normal(size=(D + 1, count))
    return np.asarray((logits + draw.gumbel(size=logits.shape)).argmax(1))


@pytest.mark.parametrize("count", [2, 4])
@pytest.mark.parametrize("weighted", [False, True])
def test_logistic_regression(count: int, weighted: bool) -> None:
    rows = vectors()
    labels = classes(rows, count)
    weights = tuple(float(w) for w in np.linspace(0.5, 2, count)) if weighted else ()
    head = TaskHeadConfig("classes", outputs=count, class_weights=weights)
    solver = Solver(torch.from_numpy(rows), torch.from_numpy(labels), head, 200)
    scaled = StandardScaler().fit_transform(rows.astype(np.float64))
    solution = None
    for strength in (0.1, 1e-3):
        solution = solver.solve(strength, solution)
        theirs = LogisticRegression(
            C=1 / (strength * N), tol=1e-8, max_iter=5000, class_weight=dict(enumerate(weights)) or None
        ).fit(scaled, labels)
        ours = solution.logits(torch.from_numpy(rows)).softmax(1).numpy()
        np.testing.assert_allclose(ours, theirs.predict_proba(scaled), atol=TOLERANCE)


def test_minimize_ends_where_the_gradient_does() -> None:
    hessian = torch.diag(torch.logspace(-1, 1, 8))

    def function(x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        return (x - 1) @ hessian @ (x - 1) / 2, hessian @ (x - 1)

    found, iterations = minimize(function, torch.zeros(8), 100, 1e-5)
    np.testing.assert_allclose(found, 1, atol=1e-3)
    assert 8 < iterations < 90
    assert minimize(function, found, 100, 1e-5)[1] == 0
    assert minimize(function, torch.zeros(8), 3, 1e-5)[1] == 3


def test_without_biases() -> None:
    rows = vectors()
    labels = classes(rows, 3)
    head = TaskHeadConfig("classes", outputs=3, bias=False)
    solution = Solver(torch.from_numpy(rows), torch.from_numpy(labels), head, 200).solve(0.01)
    assert not solution.bias.any()
    scaled = rows.astype(np.float64) / np.sqrt((rows.astype(np.float64) ** 2).mean(0))
    theirs = LogisticRegression(C=1 / (0.01 * N), tol=1e-8, max_iter=5000, fit_intercept=False)
    expected = theirs.fit(scaled, labels).predict_proba(scaled)
    ours = solution.logits(torch.from_numpy(rows)).softmax(1).numpy()
    np.testing.assert_allclose(ours, expected, atol=TOLERANCE)


def test_many_labels() -> None:
    """Each label has a logistic regression of its own; the loss is their mean."""
    rows = vectors()
    labels = np.stack([classes(rows, 2), classes(vectors(5), 2), classes(rows[::-1], 2)], 1)
    head = TaskHeadConfig("labels", outputs=3)
    solver = Solver(torch.from_numpy(rows), torch.from_numpy(labels.astype(np.float32)), head, 200)
    ours = solver.solve(0.01).logits(torch.from_numpy(rows)).sigmoid().numpy()
    scaled = StandardScaler().fit_transform(rows.astype(np.float64))
    for column in range(3):
        theirs = LogisticRegression(C=1 / (0.01 * N * 3), tol=1e-8, max_iter=5000)
        expected = theirs.fit(scaled, labels[:, column]).predict_proba(scaled)[:, 1]
        np.testing.assert_allclose(ours[:, column], expected, atol=TOLERANCE)


@pytest.mark.parametrize("outputs", [1, 2])
def test_ridge_regression(outputs: int) -> None:
    rows = vectors()
    draw = np.random.default_rng(2)
    labels = rows @ draw.normal(size=(D + 1, outputs)) + draw.normal(size=(N, outputs)) + 7
    head = TaskHeadConfig("values", outputs=outputs)
    solver = Solver(torch.from_numpy(rows), torch.from_numpy(labels.astype(np.float32)), head, 200)
    scaled = StandardScaler().fit_transform(rows.astype(np.float64))
    theirs = Ridge(alpha=0.1 * N * outputs / 2).fit(scaled, labels)
    ours = solver.solve(0.1).logits(torch.from_numpy(rows)).numpy()
    np.testing.assert_allclose(ours, theirs.predict(scaled).reshape(N, outputs), rtol=1e-3, atol=1e-3)


def test_the_strength_that_held_out_rows_prefer() -> None:
    """Of labels at random, the strongest; and weaker ones are not tried for long."""
    draw = np.random.default_rng(3)
    head = TaskHeadConfig("classes", outputs=2, dense=True)
    rows = [draw.normal(size=(60, 40)).astype(np.float32) for _ in range(2)]
    labels = [draw.integers(2, size=60) for _ in range(2)]
    config = FeaturesConfig(strengths=(1e-4, 1e-3, 1e-2, 0.1, 1.0, 10.0, 100.0))
    solved = solve_head(head, config, (rows[0], labels[0]), (rows[1], labels[1]))
    losses = [tried.validation_loss for tried in solved.tried]
    assert solved.best.validation_loss == min(loss for loss in losses if loss is not None)
    assert [tried.strength for tried in solved.tried][:3] == [100.0, 10.0, 1.0]
    assert len(solved.tried) == solved.tried.index(solved.best) + 1 + PATIENCE
    assert set(solved.weights) == {
        f"head.{layer}.{part}" for layer in ("dense", "out") for part in ("weight", "bias")
    }
    again = solve_head(head, FeaturesConfig(strengths=(0.1,)), (rows[0], labels[0]), None)
    assert [tried.strength for tried in again.tried] == [0.1]
