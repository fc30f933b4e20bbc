"""Engines over whole models, as unit tests want them."""

from __future__ import annotations

import torch
from torch import nn

from llmtrain.engine.base import Setup
from llmtrain.objectives.causal_lm import CausalLM
from llmtrain.optim.config import OptimizerConfig
from llmtrain.parallel.layout import Layout
from llmtrain.parallel.mesh import Mesh
from llmtrain.tensor_boxes import Shard


def whole_setup(model: nn.Module, layout: Layout, optimizer: OptimizerConfig) -> Setup:
    """What makes an fp32 engine of a language model that no process shares."""
    parameters = dict(model.named_parameters())
    return Setup(
        model=model,
        objective=CausalLM(),
        mesh=Mesh(layout),
        parameters=parameters,
        shards={name: Shard(tuple(p.shape)) for name, p in parameters.items()},
        device=torch.device("cpu"),
        seed=0,
        precision="fp32",
        optimizer=optimizer,
    )
