"""Matrix products in fp32 on the CPU by oneDNN, where torch itself would take MKL.

On an AMD EPYC with AVX-512 and two threads oneDNN takes 0.45 to 0.6 of MKL's time for 64 to 4,096 rows, over
forward and backward, and 0.55 to 0.75 for the 1 to 16 rows of generation. Other types, devices and small
matrices go torch's own way.

Dim names: M rows, I inputs, O outputs.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from functools import cache
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

SMALLEST = 2**17
"""Elements of a weight below which what oneDNN does around a product takes longer than it saves."""

_ONEDNN: Any = getattr(torch.ops.mkldnn, "_linear_pointwise", None)
"""(x, weight, bias, "none", [], "") → x·weightᵀ + bias: what torch's compiler calls for linear layers. It has
no gradient of its own. None in builds of torch without oneDNN."""

KERNELS = () if _ONEDNN is None else (_ONEDNN.default,)
"""Operators that products come down to besides torch's own `mm` and `addmm`."""


class Linear(nn.Linear):
    """`nn.Linear` by `linear`."""

    def forward(self, x: Tensor) -> Tensor:
        return linear(x, self.weight, self.bias)


def linear(x: Tensor, weight_OI: Tensor, bias_O: Tensor | None = None) -> Tensor:
    """`F.linear`: x·weightᵀ + bias, (…, I) → (…, O)."""
    if not _is_for_onednn(x, weight_OI):
        return F.linear(x, weight_OI, bias_O)
    if torch.is_grad_enabled():
        y: Tensor = _Linear.apply(x, weight_OI, bias_O)
        return y
    return _product(x, weight_OI, bias_O)


def product(a_MI: Tensor, b_OI: Tensor) -> Tensor:
    """a·bᵀ, (M, O), without gradients."""
    return _product(a_MI, b_OI) if _is_for_onednn(a_MI, b_OI) else a_MI @ b_OI.T


def add_product_(sum_MO: Tensor, a_MI: Tensor, b_OI: Tensor) -> None:
    """sum += a·bᵀ, without gradients; the sum may be of a wider type."""
    if sum_MO.dtype == a_MI.dtype and not _is_for_onednn(a_MI, b_OI):
        sum_MO.addmm_(a_MI, b_OI.T)
    else:
        sum_MO += product(a_MI, b_OI)


class _Linear(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, weight_OI: Tensor, bias_O: Tensor | None) -> Tensor:
        ctx.save_for_backward(x, weight_OI)
        y = _product(x, weight_OI, bias_O)
        # oneDNN gives a view for x of three dims, and what leaves a Function as one can't be summed in place.
        out: Tensor = torch.ops.aten._unsafe_view(y, y.shape)
        return out

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, ...]:
        x, weight_OI = ctx.saved_tensors
        grad_MO = gradients[0].reshape(-1, weight_OI.shape[0])
        grad_x = grad_weight_OI = grad_bias_O = None
        if ctx.needs_input_grad[0]:
            grad_x = _product(grad_MO, weight_OI.T).view(x.shape)
        if ctx.needs_input_grad[1]:
            grad_weight_OI = _product(grad_MO.T, x.reshape(-1, x.shape[-1]).T)
        if ctx.needs_input_grad[2]:
            grad_bias_O = grad_MO.sum(0)
        return grad_x, grad_weight_OI, grad_bias_O


@contextmanager
def packed_weights() -> Iterator[None]:
    """Inside, each weight is held a second time, in the layout that oneDNN likes, from its first product on:
    products with few rows then take 0.6 to 0.8 of their time. Weights must not change inside."""
    global _packed
    before, _packed = _packed, {}
    try:
        yield
    finally:
        _packed = before


_packed: dict[int, tuple[Tensor, Tensor]] | None = None
"""A weight's id → the weight, which keeps the id its own, and what it is packed into; None: nothing is."""


def _layout_of(weight_OI: Tensor) -> Tensor:
    if _packed is None or not isinstance(weight_OI, nn.Parameter):
        return weight_OI
    if id(weight_OI) not in _packed:
        reordered = torch.ops.mkldnn._reorder_linear_weight(weight_OI.detach(), None)
        _packed[id(weight_OI)] = (weight_OI, reordered)
    return _packed[id(weight_OI)][1]


def _product(x: Tensor, weight_OI: Tensor, bias_O: Tensor | None = None) -> Tensor:
    y: Tensor = _ONEDNN(x, _layout_of(weight_OI), bias_O, "none", [], "")
    return y


def _is_for_onednn(x: Tensor, weight_OI: Tensor) -> bool:
    return (
        weight_OI.numel() >= SMALLEST
        and x.device.type == "cpu"
        and x.dtype == weight_OI.dtype == torch.float32
        and x.numel() > 0
        and not torch.is_autocast_enabled("cpu")
        and _has_onednn()
    )


@cache
def _has_onednn() -> bool:
    is_x86 = torch.backends.cpu.get_cpu_capability().startswith("AVX")
    return is_x86 and _ONEDNN is not None and torch.backends.mkldnn.is_available()
