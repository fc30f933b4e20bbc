"""Build parameter groups and torch optimizers, which all engines use."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

import torch
from torch import nn
from torch.optim.adagrad import adagrad

from llmtrain.optim.config import OptimizerConfig
from llmtrain.optim.groups import Group

_FUSED_DEVICES = ("cpu", "cuda")
"""Devices for which torch has fused kernels of all optimizers here except rmsprop."""


def parameter_groups(
    named_parameters: Iterable[tuple[str, nn.Parameter]],
    weight_decay: float,
    groups: Mapping[str, Group] | None = None,
) -> list[dict[str, Any]]:
    """Return the trainable parameters by group, in the order of Group.place. "rate" of a group is its
    multiple of the step's learning rate, "penalty" what optim/penalties.py adds to the loss.

    groups: that of each name; None: parameters of two or more dimensions decay, norms and biases do not. A
    shared parameter is included once, under its first name.
    """
    found: dict[Group, list[nn.Parameter]] = {}
    seen: set[int] = set()
    for name, parameter in named_parameters:
        if not parameter.requires_grad or id(parameter) in seen:
            continue
        seen.add(id(parameter))
        group = Group(parameter.ndim >= 2) if groups is None else groups[name]
        found.setdefault(group, []).append(parameter)
    return [
        {
            "params": found[group],
            "weight_decay": weight_decay * group.decays,
            "rate": group.rate,
            "penalty": group.penalty,
        }
        for group in sorted(found, key=lambda group: group.place)
    ]


def set_lr(optimizer: torch.optim.Optimizer, lr: float) -> None:
    """Give each group its multiple of the step's learning rate `lr`."""
    for group in optimizer.param_groups:
        group["lr"] = lr * group["rate"]


def build_optimizer(
    config: OptimizerConfig,
    named_parameters: Iterable[tuple[str, nn.Parameter]],
    device_type: str,
    groups_of: Mapping[str, Group] | None = None,
) -> torch.optim.Optimizer:
    """Build the optimizer of `config` for `named_parameters` on a `device_type` device.

    groups_of: name → group, for parameters that are given as shards of another shape, or that have rates of
    their own. The caller gives each step's learning rate to `set_lr`.
    """
    groups = parameter_groups(named_parameters, config.weight_decay, groups_of)
    fused = device_type in _FUSED_DEVICES if config.fused is None else config.fused
    match config.name:
        case "adamw":
            return torch.optim.AdamW(groups, lr=config.lr, betas=config.betas, eps=config.eps, fused=fused)
        case "adam":
            return torch.optim.Adam(groups, lr=config.lr, betas=config.betas, eps=config.eps, fused=fused)
        case "sgd":
            return torch.optim.SGD(groups, lr=config.lr, momentum=config.momentum, fused=fused)
        case "adagrad":
            return Adagrad(groups, lr=config.lr, eps=config.eps, fused=fused)
        case "rmsprop":
            return torch.optim.RMSprop(
                groups, lr=config.lr, alpha=config.alpha, eps=config.eps, momentum=config.momentum
            )


class Adagrad(torch.optim.Optimizer):
    """AdaGrad (Duchi et al. 2011) with torch's kernels, whose state is created by the first step.

    torch.optim.Adagrad creates its state at construction, before ZeRO partitions the parameters. DeepSpeed
    therefore rebuilds it with a single group, which loses the weight decay of the groups.
    """

    def __init__(
        self, params: Iterable[Any], lr: float, eps: float, weight_decay: float = 0.0, fused: bool = False
    ) -> None:
        super().__init__(params, {"lr": lr, "eps": eps, "weight_decay": weight_decay, "fused": fused})

    @torch.no_grad()
    def step(self, closure: None = None) -> None:  # type: ignore[override]
        for group in self.param_groups:
            parameters = [parameter for parameter in group["params"] if parameter.grad is not None]
            for parameter in parameters:
                state = self.state[parameter]
                if not state:
                    device = parameter.device if group["fused"] else "cpu"
                    state["step"] = torch.zeros((), dtype=torch.float32, device=device)
                    state["sum"] = torch.zeros_like(parameter)
            if not parameters:
                continue
            adagrad(
                parameters,
                [parameter.grad for parameter in parameters],
                [self.state[parameter]["sum"] for parameter in parameters],
                [self.state[parameter]["step"] for parameter in parameters],
                fused=group["fused"],
                lr=group["lr"],
                weight_decay=group["weight_decay"],
                lr_decay=0.0,
                eps=group["eps"],
                maximize=False,
            )
