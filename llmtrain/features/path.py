"""A head over the vectors of a frozen trunk, with the strength of regularization that has the lowest
validation loss."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from llmtrain.features.config import FeaturesConfig
from llmtrain.features.solver import Solution, Solver, mean_loss, scales
from llmtrain.nn.task_config import TaskHeadConfig

SLOPE = 0.1
"""Slope of a dense layer that standardizes: small, so that its tanh is nearly linear."""
PATIENCE = 3
"""Strengths in a row that do not lower the validation loss, after which weaker ones are not tried."""


@dataclass(frozen=True)
class Tried:
    """One strength of regularization."""

    strength: float
    train_loss: float
    validation_loss: float | None
    iterations: int
    seconds: float


@dataclass(frozen=True)
class SolvedHead:
    """The weights of a head, by name, and the strengths that were tried to find them."""

    weights: Mapping[str, Tensor]
    tried: tuple[Tried, ...]
    best: Tried


def solve_head(
    head: TaskHeadConfig,
    config: FeaturesConfig,
    train: tuple[np.ndarray, np.ndarray],
    validation: tuple[np.ndarray, np.ndarray] | None,
) -> SolvedHead:
    """Return the weights of the head over pooled vectors.

    train, validation: vectors, fp32 (N, D), and labels as task_loss takes them. Without validation, the first
    strength is taken.

    A head with a dense layer gets one that standardizes, SLOPE · (v - mean) / deviation, before the tanh: a
    random layer would lose some of the vectors, and a pre-trained one serves another task.
    """
    weights: dict[str, Tensor] = {}
    rows_ND, labels = torch.from_numpy(train[0]), torch.from_numpy(train[1])
    dense: Callable[[Tensor], Tensor] = lambda vectors: vectors  # noqa: E731
    if head.dense:
        mean_D = rows_ND.mean(0)
        slope_D = SLOPE / scales(rows_ND - mean_D, mean_D)
        weights = {"head.dense.weight": torch.diag(slope_D), "head.dense.bias": -mean_D * slope_D}
        dense = lambda vectors: torch.addcmul(-mean_D * slope_D, vectors, slope_D).tanh()  # noqa: E731
    rows_ND = dense(rows_ND)
    held = None
    if validation is not None:
        held = dense(torch.from_numpy(validation[0])), torch.from_numpy(validation[1])
    solver = Solver(rows_ND, labels, head, config.max_iterations)
    tried: list[Tried] = []
    best: tuple[Tried, Solution] | None = None
    solution: Solution | None = None
    strengths = sorted(config.strengths, reverse=True) if held is not None else config.strengths[:1]
    for strength in strengths:
        started = time.perf_counter()
        solution = solver.solve(strength, solution)
        seconds = time.perf_counter() - started
        loss = None if held is None else mean_loss(solution, *held, head)
        tried.append(
            Tried(strength, mean_loss(solution, rows_ND, labels, head), loss, solution.iterations, seconds)
        )
        if best is None or _loss(tried[-1]) < _loss(best[0]):
            best = tried[-1], solution
        elif len(tried) - 1 - tried.index(best[0]) == PATIENCE:
            break
    assert best is not None
    weights["head.out.weight"] = best[1].weight
    if head.bias:
        weights["head.out.bias"] = best[1].bias
    return SolvedHead(weights, tuple(tried), best[0])


def _loss(tried: Tried) -> float:
    return float("inf") if tried.validation_loss is None else tried.validation_loss


def table(solved: SolvedHead) -> list[str]:
    """Return a line for each strength that was tried."""
    lines = [f"{'strength':>10} {'train loss':>11} {'validation':>11} {'iterations':>11} {'seconds':>8}"]
    for row in solved.tried:
        held = "" if row.validation_loss is None else f"{row.validation_loss:.4f}"
        mark = "  best" if row is solved.best and len(solved.tried) > 1 else ""
        found = f"{row.strength:>10g} {row.train_loss:>11.4f} {held:>11}"
        lines.append(f"{found} {row.iterations:>11} {row.seconds:>8.2f}{mark}")
    return lines


def facts(solved: SolvedHead) -> dict[str, Any]:
    """Return the strengths that were tried, as JSON."""
    rows = [{name: getattr(row, name) for name in row.__dataclass_fields__} for row in solved.tried]
    return {"strength": solved.best.strength, "tried": rows}
