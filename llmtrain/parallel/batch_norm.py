"""Batch norm whose statistics are those of all replicas' micro-batches, as if one process had them all."""

from __future__ import annotations

from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from llmtrain.nn.batch_norm import BatchNorm
from llmtrain.parallel.mesh import Mesh


class _Total(torch.autograd.Function):
    """The sum over ranks. Its gradient is the sum of all ranks' gradients, since each rank's loss depends on
    it."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, group: Any) -> Tensor:
        ctx.group = group
        x = x.contiguous().clone()
        dist.all_reduce(x, group=group)
        return x

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, None]:
        gradient = gradients[0].contiguous().clone()
        dist.all_reduce(gradient, group=ctx.group)
        return gradient, None


def share_norms(model: nn.Module, mesh: Mesh) -> None:
    """Let the batch norms of `model` that are synchronized take their statistics over all replicas."""
    if mesh.replicas == 1:
        return

    def total(x: Tensor) -> Tensor:
        summed: Tensor = _Total.apply(x, mesh.replica_group)
        return summed

    for module in model.modules():
        if isinstance(module, BatchNorm) and module.synchronized:
            module.total = total
