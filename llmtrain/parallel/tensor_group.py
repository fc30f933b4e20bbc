"""Collectives of this process' tensor group over activations, with their gradients (Megatron-LM,
arXiv:1909.08053; its sequence parallelism, arXiv:2205.05198).

What they give in a layer's forward pass is kept where the layer is recomputed selectively (`kept` of
parallel/recompute.py).

Dim names: B batch, T sequence, D hidden width.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from llmtrain.parallel.recompute import kept


def group() -> Any:
    """Return fairscale's group for tensor parallelism."""
    from fairscale.nn.model_parallel.initialize import get_model_parallel_group

    return get_model_parallel_group()


def rank() -> int:
    """Return the number of this process in the group."""
    return dist.get_rank(group())


def size() -> int:
    return dist.get_world_size(group())


class Sum(torch.autograd.Function):
    """All-reduce, in place; the backward pass hands the gradient on."""

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        y = kept(_sum, x)
        if y is x:
            ctx.mark_dirty(x)
        return y

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> Tensor:
        return gradients[0]


class GatherTokens(torch.autograd.Function):
    """All-gather (B, T / tensor, D) → (B, T, D); the backward pass reduce-scatters."""

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        return kept(_gather_tokens, x)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> Tensor:
        return _sum_and_cut_tokens(gradients[0])


class SumAndCutTokens(torch.autograd.Function):
    """Reduce-scatter (B, T, D) → (B, T / tensor, D); the backward pass all-gathers."""

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        return kept(_sum_and_cut_tokens, x)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> Tensor:
        return _gather_tokens(gradients[0])


class CutTokens(torch.autograd.Function):
    """Slice (B, T, D), equal on all processes → (B, T / tensor, D); the backward pass all-gathers."""

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        return _own_tokens(x)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> Tensor:
        return _gather_tokens(gradients[0])


def _sum(x: Tensor) -> Tensor:
    if size() > 1:
        dist.all_reduce(x, group=group())
    return x


def _gather_tokens(x: Tensor) -> Tensor:
    parts = [torch.empty_like(x, memory_format=torch.contiguous_format) for _ in range(size())]
    dist.all_gather(parts, x.contiguous(), group=group())
    return torch.cat(parts, dim=1)


def _sum_and_cut_tokens(x: Tensor) -> Tensor:
    x = x.contiguous().clone()
    if dist.get_backend(group()) != "gloo":
        parts = [part.contiguous() for part in x.chunk(size(), dim=1)]
        out = torch.empty_like(parts[0])
        dist.reduce_scatter(out, parts, group=group())
        return out
    dist.all_reduce(x, group=group())  # gloo has no reduce-scatter
    return _own_tokens(x)


def _own_tokens(x: Tensor) -> Tensor:
    return x.chunk(size(), dim=1)[rank()].contiguous()
