"""Logistic regression, with one label or many, and ridge regression over the vectors of texts.

Dim names: N rows, D vector, C outputs, K columns that are solved for.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
from torch import Tensor

from llmtrain.features.minimize import minimize
from llmtrain.nn.task_config import TaskHeadConfig
from llmtrain.nn.task_head import task_loss

GRADIENT_TOLERANCE = 1e-4
"""Largest entry of the gradient at which a solution counts as found, where the Hessian is about 1."""
ROUNDING = 1e-5
"""Deviation, as a share of the mean, up to which a column of vectors counts as constant."""
JITTER = 1e-6
"""Share of the mean variance that is added to a Hessian, which rounding could make indefinite."""


@dataclass(frozen=True)
class Solution:
    """The outputs of a head."""

    weight: Tensor
    """(C, D)."""
    bias: Tensor
    """(C), 0 for a head without biases."""
    iterations: int
    columns: Tensor
    """Solution over standardized vectors (mean 0, variance 1), (D, K); the next solve may start from it."""
    constants: Tensor
    """The same of the biases, (K)."""

    def logits(self, vectors_ND: Tensor) -> Tensor:
        return torch.addmm(self.bias, vectors_ND, self.weight.T)


class Solver:
    """Minimizes mean loss + strength/2 · |W|² over the outputs W of a head, for vectors of mean 0 and
    variance 1; biases bear no penalty. The solution is given for the vectors as they are."""

    def __init__(self, vectors_ND: Tensor, labels: Tensor, head: TaskHeadConfig, max_iterations: int) -> None:
        """vectors_ND: what the outputs of the head read, fp32; labels: as task_loss takes them."""
        self._head, self._labels, self._max_iterations = head, labels, max_iterations
        # A head without biases sees no constant, so its vectors keep their mean.
        self._mean_D = vectors_ND.mean(0) if head.bias else torch.zeros_like(vectors_ND[0])
        rows_ND = vectors_ND - self._mean_D
        self._scale_D = scales(rows_ND, self._mean_D)
        self._rows_ND = rows_ND.div_(self._scale_D)
        self._gram_DD = (self._rows_ND.T @ self._rows_ND).double() / len(rows_ND)

    def solve(self, strength: float, start: Solution | None = None) -> Solution:
        """Return the solution for a strength. start: that of another strength, near which it may be."""
        if self._head.loss == "squares":
            return self._ridge(strength)
        return self._logistic(strength, start)

    def _ridge(self, strength: float) -> Solution:
        """Solve (G + strength · C/2) W = XᵀY/N: the loss is the mean of the squared error over C outputs."""
        outputs = self._head.num_outputs
        mean_C = self._labels.mean(0) if self._head.bias else torch.zeros_like(self._labels[0])
        factor = self._cholesky(1.0, strength * outputs / 2)
        right_DC = self._rows_ND.T @ (self._labels - mean_C) / len(self._rows_ND)
        columns = torch.cholesky_solve(right_DC.double(), factor).float()
        return self._solution(columns, mean_C, 1)

    def _logistic(self, strength: float, start: Solution | None) -> Solution:
        """Minimize by L-BFGS in coordinates in which the Hessian at W = 0 is the identity, so that few
        iterations are needed however the vectors are correlated."""
        outputs = self._head.num_outputs
        width = 1 if self._is_binary else outputs
        curvature = 0.25 if self._is_binary else (outputs - 1) / outputs**2
        if self._head.loss == "sigmoid":
            curvature = 0.25 / outputs
        factor_DD = self._cholesky(curvature, strength)
        eye_DD = torch.eye(len(factor_DD), dtype=factor_DD.dtype)
        back_DD = torch.linalg.solve_triangular(factor_DD, eye_DD, upper=False).T.float().contiguous()
        per_constant, num_constants = curvature**-0.5, width if self._head.bias else 0
        x = torch.zeros(len(self._mean_D) * width + num_constants)
        if start is not None:
            x_DK, b_K = factor_DD.T.float() @ start.columns, start.constants / per_constant
            x = torch.cat([x_DK.flatten(), b_K[:num_constants]])

        def columns(x: Tensor) -> tuple[Tensor, Tensor]:
            matrix, constants = x[: len(x) - num_constants], x[len(x) - num_constants :]
            b_K = constants * per_constant if num_constants else torch.zeros(width)
            return back_DD @ matrix.view(-1, width), b_K

        def loss(x: Tensor) -> tuple[Tensor, Tensor]:
            x = x.clone().requires_grad_()
            w_DK, b_K = columns(x)
            logits = self._spread(torch.addmm(b_K, self._rows_ND, w_DK))
            total = task_loss(logits, self._labels, self._head) / len(self._labels)
            total = total + strength / 2 * w_DK.square().sum()
            return total.detach(), torch.autograd.grad(total, x)[0]

        x, iterations = minimize(loss, x, self._max_iterations, GRADIENT_TOLERANCE)
        return self._solution(*columns(x), iterations)

    @property
    def _is_binary(self) -> bool:
        """Return whether there are two classes: only the difference of their logits matters then."""
        return self._head.loss == "softmax" and self._head.num_outputs == 2

    def _spread(self, columns: Tensor) -> Tensor:
        """Return the outputs (…, C) that the columns (…, K) stand for."""
        return torch.cat([-columns / 2, columns / 2], -1) if self._is_binary else columns

    def _cholesky(self, curvature: float, strength: float) -> Tensor:
        """Return the lower factor of curvature · G + strength, fp64."""
        hessian_DD = self._gram_DD * curvature
        hessian_DD.diagonal().add_(strength + JITTER * curvature)
        return torch.linalg.cholesky(hessian_DD)

    def _solution(self, columns_DK: Tensor, constants_K: Tensor, iterations: int) -> Solution:
        """Return the outputs for vectors as they are: of (v - mean) / scale they have the same logits."""
        w_DC = self._spread(columns_DK) / self._scale_D[:, None]
        bias_C = self._spread(constants_K) - self._mean_D @ w_DC
        return Solution(w_DC.T.contiguous(), bias_C, iterations, columns_DK, constants_K)


def scales(rows_ND: Tensor, mean_D: Tensor) -> Tensor:
    """Return the deviation of each column of rows whose mean was taken off; 1 for a column that differs by no
    more than rounding, which would be scaled up."""
    deviation_D = rows_ND.square().mean(0).sqrt()
    return torch.where(deviation_D > ROUNDING * mean_D.abs(), deviation_D, torch.ones_like(deviation_D))


def mean_loss(solution: Solution, vectors_ND: Tensor, labels: Tensor, head: TaskHeadConfig) -> float:
    """Return the mean loss of a row without class weights, as an evaluation measures it."""
    unweighted = replace(head, class_weights=())
    return float(task_loss(solution.logits(vectors_ND), labels, unweighted)) / max(1, len(labels))
