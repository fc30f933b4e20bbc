"""Penalties on weights are terms of the gradient, with every optimizer and after a resume."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import nn

from llmtrain.optim.config import OptimizerConfig
from llmtrain.optim.groups import Penalty, make_groups
from llmtrain.optim.optimizers import build_optimizer
from llmtrain.optim.penalties import START, apply_penalties

PENALTIES = {"weight": Penalty(0.3, True), "bias": Penalty(0.2, False)}


def stepped(name: str, penalties: dict[str, Penalty], steps: int, by_hand: bool = False) -> tuple[Any, Any]:
    """A layer after some steps of descent, and its optimizer. by_hand: the penalty is part of the loss."""
    torch.manual_seed(0)
    layer = nn.Linear(5, 3)
    named = dict(layer.named_parameters())
    groups = make_groups({name: tuple(p.shape) for name, p in named.items()}, {}, {}, penalties)
    config = OptimizerConfig(name, weight_decay=0.0, lr=0.05)  # type: ignore[arg-type]
    optimizer = build_optimizer(config, named.items(), "cpu", groups)
    apply_penalties(optimizer)
    start = layer.weight.detach().clone()
    for _ in range(steps):
        loss = layer(torch.randn(4, 5)).square().sum()
        if by_hand:
            loss = loss + 0.3 * (layer.weight - start).square().sum() + 0.2 * layer.bias.square().sum()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    return layer, optimizer


@pytest.mark.parametrize("name", ["adamw", "sgd", "adagrad", "rmsprop"])
def test_equals_the_penalty_in_the_loss(name: str) -> None:
    ours, optimizer = stepped(name, PENALTIES, 5)
    theirs, _ = stepped(name, {}, 5, by_hand=True)
    without, _ = stepped(name, {}, 5)
    for of_ours, of_theirs in zip(ours.parameters(), theirs.parameters(), strict=True):
        torch.testing.assert_close(of_ours, of_theirs, rtol=1e-6, atol=1e-6)
    assert (ours.weight - without.weight).abs().max() > 1e-3
    assert START in optimizer.state[ours.weight]
    assert START not in optimizer.state[ours.bias]


def test_large_weights_are_taken_in_parts(monkeypatch: pytest.MonkeyPatch) -> None:
    from llmtrain.optim import penalties

    whole, _ = stepped("adamw", PENALTIES, 3)
    monkeypatch.setattr(penalties, "_CHUNK", 6)
    parts, _ = stepped("adamw", PENALTIES, 3)
    assert torch.equal(whole.weight, parts.weight)


def test_a_weight_without_a_gradient_is_left_alone() -> None:
    weight = nn.Parameter(torch.ones(2, 2))
    groups = make_groups({"w": (2, 2)}, {}, {}, {"w": Penalty(1.0, False)})
    optimizer = build_optimizer(OptimizerConfig("sgd", lr=0.1), [("w", weight)], "cpu", groups)
    apply_penalties(optimizer)
    optimizer.step()
    assert torch.equal(weight, torch.ones(2, 2))
