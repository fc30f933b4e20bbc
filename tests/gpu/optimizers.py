"""Each optimizer's fused kernel against its plain form, over the same gradients."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import torch
from torch import nn

from llmtrain.optim.config import OptimizerConfig
from llmtrain.optim.optimizers import build_optimizer
from tests.gpu.runs import distance
from tests.gpu.table import Row, judged

STEPS, TOLERANCE = 5, 1e-5
"""Relative, of the way that the weights went: the kernels round in another order."""
CONFIGS = (
    OptimizerConfig("adamw", lr=1e-2),
    OptimizerConfig("adam", lr=1e-2),
    OptimizerConfig("sgd", lr=1e-2, momentum=0.9),
    OptimizerConfig("adagrad", lr=1e-2),
)


def check(device: str, folder: Path) -> Iterator[Row]:
    for config in CONFIGS:
        moved = []
        for fused in (True, False):
            torch.manual_seed(0)
            model = nn.Sequential(nn.Linear(64, 256), nn.LayerNorm(256), nn.Linear(256, 64)).to(device)
            before = [p.detach().clone() for p in model.parameters()]
            fitting = OptimizerConfig(config.name, lr=config.lr, momentum=config.momentum, fused=fused)
            optimizer = build_optimizer(fitting, model.named_parameters(), device)
            for step in range(STEPS):
                for number, parameter in enumerate(model.parameters()):
                    generator = torch.Generator().manual_seed(100 * step + number)
                    parameter.grad = torch.randn(parameter.shape, generator=generator).to(device)
                optimizer.step()
            moved.append([p - was for p, was in zip(model.parameters(), before, strict=True)])
        apart = distance(*moved)
        detail = f"{apart:.1e} of the way (at most {TOLERANCE:g})"
        yield judged("optimizers", config.name, apart <= TOLERANCE, detail)
