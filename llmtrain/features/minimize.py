"""Minimize a smooth convex function by L-BFGS (Liu and Nocedal 1989)."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable

from torch import Tensor

from llmtrain.watch import phases

HISTORY = 10
"""Number of the latest steps from which the Hessian is estimated."""
SUFFICIENT = 1e-4
"""Share of the expected decrease that a step must reach to be taken (Armijo's rule)."""
ROUNDING = 1e-7
"""Relative error of a value in fp32."""
SHORTEST = 2.0**-20


def minimize(
    function: Callable[[Tensor], tuple[Tensor, Tensor]], x: Tensor, max_iterations: int, tolerance: float
) -> tuple[Tensor, int]:
    """Return the minimizer of `function` and the number of iterations.

    function: x → its value, 0-d, and its gradient; best with a Hessian near the identity, since the first
    step is the gradient itself. x: where to begin, 1-D. tolerance: largest entry of the gradient at the end.
    """
    value, gradient = function(x)
    history: deque[tuple[Tensor, Tensor]] = deque(maxlen=HISTORY)
    for iteration in range(max_iterations):
        phases.go_on()
        if float(gradient.abs().max()) <= tolerance:
            return x, iteration
        direction = -_newton(gradient, history)
        slope = float(gradient @ direction)
        noise = ROUNDING * abs(float(value))
        step = 1.0
        while True:
            next_x = x + step * direction
            next_value, next_gradient = function(next_x)
            if float(next_value) <= float(value) + SUFFICIENT * step * slope + noise:
                break
            step /= 2
            if step < SHORTEST:  # rounding hides what there is to gain
                return x, iteration
        moved, turned = next_x - x, next_gradient - gradient
        if float(moved @ turned) > 0:
            history.append((moved, turned))
        x, value, gradient = next_x, next_value, next_gradient
    return x, max_iterations


def _newton(gradient: Tensor, history: deque[tuple[Tensor, Tensor]]) -> Tensor:
    """Return the estimated inverse Hessian times the gradient, by the two-loop recursion."""
    direction = gradient.clone()
    weights = []
    for moved, turned in reversed(history):
        weight = (moved @ direction) / (moved @ turned)
        direction -= weight * turned
        weights.append(weight)
    if history:
        moved, turned = history[-1]
        direction *= (moved @ turned) / (turned @ turned)
    for (moved, turned), weight in zip(history, reversed(weights), strict=True):
        direction += (weight - (turned @ direction) / (moved @ turned)) * moved
    return direction
