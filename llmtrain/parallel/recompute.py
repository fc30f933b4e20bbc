"""Recomputation: blocks whose activations the backward pass computes again (arXiv:1604.06174, 2205.05198).

Only the `forward` of each block is replaced, so that names of parameters stay, hooks of modules run at
each computation, and what stands in a block, whole layers or shards, does not matter.

Dim names: B batch, T sequence, D hidden width.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint, create_selective_checkpoint_contexts

from llmtrain.models.transformer import Context
from llmtrain.parallel.config import RecomputeConfig

Forward = Callable[[Tensor, Context], Tensor]

LINEAR_PRODUCTS = [torch.ops.aten.mm.default, torch.ops.aten.addmm.default]
"""What linear layers call; attention's products are batched, `bmm`."""


def apply_recompute(model: nn.Module, config: RecomputeConfig) -> None:
    """Make the blocks that `config` names recompute, in place. After whatever replaces layers in them.

    model: has `blocks`, an nn.ModuleList of what is called as block(x_BTD, context).

    Losses and gradients stay what they were, bit by bit. Nothing is recomputed where no gradient is wanted
    or a cache is filled.
    """
    wrap = {"selective": _selective, "full": _full, "offload": _offload}.get(config.mode)
    if wrap is None:
        return
    for number, block in enumerate(cast(nn.ModuleList, model.blocks)):
        if config.covers(number):
            block.forward = functools.partial(_forward, block.forward, wrap(block))


def _forward(plain: Forward, recomputed: Forward, x_BTD: Tensor, context: Context) -> Tensor:
    """`plain` where nothing is kept anyway or where a second run would fill the cache twice."""
    if not torch.is_grad_enabled() or context.cache is not None:
        return plain(x_BTD, context)
    return recomputed(x_BTD, context)


def _full(block: nn.Module) -> Forward:
    return functools.partial(_checkpoint, block.forward, {})


def _selective(block: nn.Module) -> Forward:
    contexts = functools.partial(create_selective_checkpoint_contexts, LINEAR_PRODUCTS)
    return functools.partial(_checkpoint, block.forward, {"context_fn": contexts})


def _checkpoint(forward: Forward, settings: dict[str, Any], x_BTD: Tensor, context: Context) -> Tensor:
    with _Autocast.here(x_BTD).without_cache():
        y_BTD: Tensor = checkpoint(
            forward,
            x_BTD,
            context,
            use_reentrant=False,
            # Masks made from keys need no generator.
            preserve_rng_state=context.dropout_keys is None,
            **settings,
        )
    return y_BTD


def _offload(block: nn.Module) -> Forward:
    from fairscale.nn.checkpoint import checkpoint_wrapper

    wrapper = checkpoint_wrapper(_WithAutocast(block), offload_to_cpu=True)
    return lambda x_BTD, context: wrapper(x_BTD, context, _Autocast.here(x_BTD))


class _WithAutocast(nn.Module):
    """A block that is told in which precision to run: fairscale restores only a GPU's fp16."""

    def __init__(self, block: nn.Module) -> None:
        super().__init__()
        self.block = block
        self._forward = block.forward

    def forward(self, x_BTD: Tensor, context: Context, autocast: _Autocast) -> Tensor:
        with autocast.without_cache():
            y_BTD: Tensor = self._forward(x_BTD, context)
        return y_BTD


class _Autocast:
    """The autocast of a moment, to be entered again."""

    def __init__(self, device: str, dtype: torch.dtype | None) -> None:
        self._device, self._dtype = device, dtype

    @classmethod
    def here(cls, x: Tensor) -> _Autocast:
        """That of x's device, now."""
        device = x.device.type
        return cls(device, torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else None)

    def without_cache(self) -> AbstractContextManager[Any]:
        """Weights in the low precision then live no longer than their block is at work, and none made
        without gradients is taken for one with."""
        if self._dtype is None:
            return nullcontext()
        return torch.autocast(self._device, self._dtype, cache_enabled=False)
