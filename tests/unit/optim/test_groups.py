"""Which parameters share an optimizer group, and at which rate they learn."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from llmtrain.optim.config import OptimizerConfig
from llmtrain.optim.groups import Group, level_of, make_groups, rate_problems, rates
from llmtrain.optim.optimizers import build_optimizer, parameter_groups, set_lr

LEVELS = [["embedding"], ["blocks.1"], ["blocks.10"], ["norm", "head"]]
NAMES = ("embedding.weight", "blocks.1.up.weight", "blocks.10.up.weight", "norm.weight", "head.out.weight")


def test_rates_fall_from_the_head_down() -> None:
    found = rates(NAMES, LEVELS, OptimizerConfig(lr=0.1, layer_decay=0.5, head_lr=0.2))
    assert list(found.values()) == pytest.approx([0.125, 0.25, 0.5, 1.0, 2.0])
    assert set(rates(NAMES, LEVELS, OptimizerConfig()).values()) == {1.0}
    assert level_of("blocks.10.up.weight", LEVELS) == 2
    assert level_of("other.weight", LEVELS) is None


def test_a_model_without_layers_or_head() -> None:
    config = OptimizerConfig(layer_decay=0.5, head_lr=0.2)
    assert [p.where for p in rate_problems(NAMES[:1], None, "cnn", config)] == ["layer_decay", "head_lr"]
    assert list(rate_problems(NAMES, LEVELS, "gpt", config)) == []
    assert list(rate_problems(NAMES[:1], None, "cnn", OptimizerConfig())) == []


def test_groups_are_those_with_equal_rates_and_updates() -> None:
    shapes = {"a": (2, 2), "b": (2,), "c": (2, 2), "d": (2, 2)}
    groups = make_groups(shapes, {"c": 0.5}, {"d": 3.0})
    assert groups == {
        "a": Group(True),
        "b": Group(False),
        "c": Group(True, 0.5),
        "d": Group(True, 1.0, 3.0),
    }
    named = {name: nn.Parameter(torch.zeros(shape)) for name, shape in shapes.items()}
    found = parameter_groups(named.items(), 0.1, groups)
    order = [[name for name, p in named.items() if p is group["params"][0]] for group in found]
    assert order == [["d"], ["a"], ["c"], ["b"]]
    optimizer = build_optimizer(OptimizerConfig(), named.items(), "cpu", groups)
    set_lr(optimizer, 0.2)
    assert [group["lr"] for group in optimizer.param_groups] == [0.2, 0.2, 0.1, 0.2]
    assert [group["weight_decay"] for group in optimizer.param_groups] == [0.1, 0.1, 0.1, 0.0]
