"""Recomputation: blocks whose activations the backward pass computes again (arXiv:1604.06174, 2205.05198).

Only the `forward` of each block is replaced, so that names of parameters stay, hooks of modules run at
each computation, and what stands in a block, whole layers or shards, does not matter.

Dim names: B batch, T sequence, D hidden width.
"""

from __future__ import annotations

import functools
from collections import deque
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.checkpoint import checkpoint

from llmtrain.nn.linear import KERNELS
from llmtrain.nn.recompute_config import RecomputeConfig
from llmtrain.nn.transformer import Context

Forward = Callable[[Tensor, Context], Tensor]

LINEAR_PRODUCTS = (torch.ops.aten.mm.default, torch.ops.aten.addmm.default, *KERNELS)
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
            trains = any(parameter.requires_grad for parameter in block.parameters())
            block.forward = functools.partial(_forward, block.forward, wrap(block), trains)


def _forward(plain: Forward, recomputed: Forward, trains: bool, x_BTD: Tensor, context: Context) -> Tensor:
    """`plain` where nothing is kept anyway or where a second run would fill the cache twice.

    trains: whether the block has parameters that do; where it has none, gradients may not come so far.
    """
    has_gradient = torch.is_grad_enabled() and (trains or x_BTD.requires_grad)
    if not has_gradient or context.cache is not None:
        return plain(x_BTD, context)
    return recomputed(x_BTD, context)


def _full(block: nn.Module) -> Forward:
    return functools.partial(_checkpoint, block.forward, {})


def _selective(block: nn.Module) -> Forward:
    return functools.partial(_checkpoint, block.forward, {"context_fn": _keep_and_reuse})


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


def _keep_and_reuse() -> tuple[AbstractContextManager[Any], AbstractContextManager[Any]]:
    """Around a block's forward, and around its recomputation."""
    outputs: deque[Tensor] = deque()
    return _Keep(outputs), _Reuse(outputs)


class _Keep(TorchDispatchMode):
    """Puts the outputs of linear products into `outputs`, in order.

    What changes one in place afterwards (the bias of DeepSpeed's linear layer, the sum over a tensor
    group) finds the original kept aside: recomputation will make the change again. torch's own selective
    checkpointing misses such changes when they go through an unsafe view, and computes on with the sum of
    both.
    """

    def __init__(self, outputs: deque[Tensor]) -> None:
        super().__init__()
        self._outputs = outputs
        self._places: dict[int, int] = {}
        """Address of an output's storage → its number."""

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        # Collectives do not say in their schemas that they write.
        if func._schema.is_mutable or func.namespace == "c10d":
            for argument in tree_leaves((args, kwargs)):
                if isinstance(argument, Tensor):
                    self._set_aside(argument)
        result = func(*args, **(kwargs or {}))
        if func in LINEAR_PRODUCTS:
            self._places[result.untyped_storage().data_ptr()] = len(self._outputs)
            # Autograd will hang the graph, which holds this list, on the result itself.
            self._outputs.append(result.detach())
        return result

    def _set_aside(self, tensor: Tensor) -> None:
        place = self._places.pop(tensor.untyped_storage().data_ptr(), None) if self._places else None
        if place is not None:
            self._outputs[place] = self._outputs[place].clone()


class _Reuse(TorchDispatchMode):
    """Answers linear products from `outputs`, in order."""

    def __init__(self, outputs: deque[Tensor]) -> None:
        super().__init__()
        self._outputs = outputs

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func in LINEAR_PRODUCTS:
            return self._outputs.popleft()
        return func(*args, **(kwargs or {}))


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
