"""Penalties on weights, as terms of their gradients: L2-SP holds them near the values that they started from
(Li et al. 2018, arXiv:1802.01483, equations 2 and 3)."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

START = "start"
"""State of an optimizer: the values that the weights started from. Checkpoints hold it as they hold the
running averages, divided as these are, so that no folder is needed to resume."""
_CHUNK = 2**20
"""Elements of a weight whose distance is held at once."""


def apply_penalties(optimizer: torch.optim.Optimizer) -> None:
    """From now on, add the gradients of the penalties of its groups before each step of `optimizer`:
    2 · factor · (w − w_start), or 2 · factor · w.

    They are added where torch adds the weight decay of its optimizers: after clipping, before the averages of
    Adam. The values at the first step are those that a weight started from, unless a checkpoint has others.
    """
    first: dict[Tensor, Tensor] = {}

    def before_step(optimizer: Any, _args: Any, _kwargs: Any) -> None:
        for group in optimizer.param_groups:
            factor, to_start = group["penalty"]
            if factor == 0.0:
                continue
            for weight in group["params"]:
                if weight.grad is None:
                    continue
                start = optimizer.state[weight].get(START) if to_start else None
                if to_start and start is None:
                    # Other state is made by the first step, which wants to find none.
                    first[weight] = weight.detach().clone()
                    continue
                _add_gradient(weight, start, factor)

    def after_step(optimizer: Any, _args: Any, _kwargs: Any) -> None:
        for weight, start in first.items():
            optimizer.state[weight][START] = start
        first.clear()

    optimizer.register_step_pre_hook(before_step)
    optimizer.register_step_post_hook(after_step)


@torch.no_grad()
def _add_gradient(weight: Tensor, start: Tensor | None, factor: float) -> None:
    assert weight.grad is not None
    rows = max(1, _CHUNK * max(1, weight.shape[0] if weight.ndim else 1) // max(1, weight.numel()))
    gradients = torch.atleast_1d(weight.grad).split(rows)
    starts = [None] * len(gradients) if start is None else torch.atleast_1d(start).split(rows)
    for part, gradient, origin in zip(torch.atleast_1d(weight).split(rows), gradients, starts, strict=True):
        gradient.add_(part if origin is None else part - origin, alpha=2.0 * factor)
