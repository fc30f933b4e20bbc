"""Recompute activations of blocks in the backward pass (arXiv:1604.06174, 2205.05198).

Only the `forward` of each block is replaced. Names of parameters thus stay the same, module hooks run at each
computation, and the contents of a block (whole layers or shards) do not matter.

Dim names: B batch, T sequence, D hidden width.
"""

from __future__ import annotations

import functools
from collections import deque
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from typing import Any, ClassVar, cast

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
"""Operators of linear layers; products in attention use `bmm`."""


def apply_recompute(model: nn.Module, config: RecomputeConfig) -> None:
    """Make the blocks that `config` selects recompute their activations, in place. Call this after layers in
    them have been replaced.

    model: has `blocks`, an nn.ModuleList of modules called as block(x_BTD, context).
    Losses and gradients stay bitwise the same. Nothing is recomputed without gradients or with a cache.
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
            # Dropout masks made from keys do not use the generator.
            preserve_rng_state=context.dropout_keys is None,
            **settings,
        )
    return y_BTD


def _keep_and_reuse() -> tuple[AbstractContextManager[Any], AbstractContextManager[Any]]:
    """Return the contexts for the forward pass of a block and for its recomputation."""
    outputs: deque[Tensor] = deque()
    return _Keep(outputs), _Reuse(outputs)


def kept(communicate: Callable[[Tensor], Tensor], x: Tensor) -> Tensor:
    """Return what `communicate` gives of x, which nothing else reads after it; in the selective recomputation
    of a layer, what it gave in the forward pass, without communicating again."""
    return communicate(x) if _Layer.current is None else _Layer.current.communicated(communicate, x)


class _Layer(TorchDispatchMode):
    """Sees the operations of a layer that is recomputed selectively."""

    current: ClassVar[_Layer | None] = None

    def __init__(self, outputs: deque[Tensor]) -> None:
        super().__init__()
        self._outputs = outputs

    def __enter__(self) -> _Layer:
        _Layer.current = self
        super().__enter__()
        return self

    def __exit__(self, *error: Any) -> None:
        _Layer.current = None
        super().__exit__(*error)

    def communicated(self, communicate: Callable[[Tensor], Tensor], x: Tensor) -> Tensor:
        """Return what `communicate` gives, or gave, of x."""
        raise NotImplementedError


class _Keep(_Layer):
    """Appends the outputs of linear products, and what collectives give, to `outputs`, in order.

    Before an output is modified in place (by the bias of DeepSpeed's linear layer, or the sum over a tensor
    group), the original is cloned, because recomputation repeats the modification. torch's own selective
    checkpointing misses modifications through an unsafe view, and applies them twice.
    """

    def __init__(self, outputs: deque[Tensor]) -> None:
        super().__init__(outputs)
        self._numbers: dict[int, int] = {}
        """Storage of an output → its number."""

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        # The schemas of collectives do not declare that they write.
        if func._schema.is_mutable or func.namespace == "c10d":
            for argument in tree_leaves((args, kwargs)):
                if isinstance(argument, Tensor):
                    self._preserve(argument)
        result = func(*args, **(kwargs or {}))
        if func in LINEAR_PRODUCTS:
            self._append(result)
        return result

    def communicated(self, communicate: Callable[[Tensor], Tensor], x: Tensor) -> Tensor:
        number = self._numbers.pop(x.untyped_storage()._cdata, None)
        if number is not None:
            # A product that is communicated at once: of it the recomputation needs the shape alone.
            summand = self._outputs[number]
            self._outputs[number] = summand.new_empty(()).expand(summand.shape)
        y = communicate(x)
        self._append(y)
        return y

    def _append(self, output: Tensor) -> None:
        self._numbers[output.untyped_storage()._cdata] = len(self._outputs)
        # Detach: the graph that autograd attaches to the output holds this list.
        self._outputs.append(output.detach())

    def _preserve(self, tensor: Tensor) -> None:
        """Clone the output with the storage of `tensor`, if any, before it is modified."""
        number = self._numbers.pop(tensor.untyped_storage()._cdata, None) if self._numbers else None
        if number is not None:
            self._outputs[number] = self._outputs[number].clone()


class _Reuse(_Layer):
    """Returns the kept `outputs`, in order, instead of computing linear products and communicating."""

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func in LINEAR_PRODUCTS:
            return self._outputs.popleft()
        return func(*args, **(kwargs or {}))

    def communicated(self, communicate: Callable[[Tensor], Tensor], x: Tensor) -> Tensor:
        return self._outputs.popleft()


def _offload(block: nn.Module) -> Forward:
    from fairscale.nn.checkpoint import checkpoint_wrapper

    wrapper = checkpoint_wrapper(_WithAutocast(block), offload_to_cpu=True)
    return lambda x_BTD, context: wrapper(x_BTD, context, _Autocast.here(x_BTD))


class _WithAutocast(nn.Module):
    """A block with an explicit autocast precision, because fairscale restores autocast only for fp16 on a
    GPU."""

    def __init__(self, block: nn.Module) -> None:
        super().__init__()
        self.block = block
        self._forward = block.forward

    def forward(self, x_BTD: Tensor, context: Context, autocast: _Autocast) -> Tensor:
        with autocast.without_cache():
            y_BTD: Tensor = self._forward(x_BTD, context)
        return y_BTD


class _Autocast:
    """The autocast state at one time, to be entered again later."""

    def __init__(self, device: str, dtype: torch.dtype | None) -> None:
        self._device, self._dtype = device, dtype

    @classmethod
    def here(cls, x: Tensor) -> _Autocast:
        """Return the current autocast state for the device of `x`."""
        device = x.device.type
        return cls(device, torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else None)

    def without_cache(self) -> AbstractContextManager[Any]:
        """Enter the autocast without its cache of converted weights: these are then freed after their block,
        and copies made without gradients are not reused where gradients are needed."""
        if self._dtype is None:
            return nullcontext()
        return torch.autocast(self._device, self._dtype, cache_enabled=False)
