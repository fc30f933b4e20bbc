"""Matrix products by the fastest method for the processor.

On a CPU torch uses MKL for fp32, which uses AVX-512 only on Intel processors: on an AMD EPYC with AVX-512
oneDNN takes 0.45 to 0.6 of MKL's time, on one with AVX2 1.0 to 1.8 times as long. For bf16 and fp16 torch
uses oneDNN if the processor has instructions for them, and otherwise plain loops, which take twenty times as
long as fp32; in that case products are computed in fp32 from rounded inputs, and rounded.

Dim names: M rows, I inputs, O outputs.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from functools import cache
from pathlib import Path
from typing import Any, Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

SMALLEST = 2**17
"""Elements of a weight below which oneDNN's overhead exceeds its gain."""

_ONEDNN: Any = getattr(torch.ops.mkldnn, "_linear_pointwise", None)
"""(x, weight, bias, "none", [], "") → x·weightᵀ + bias: the operator that torch's compiler uses for linear
layers. It has no gradient. None in builds of torch without oneDNN."""

_LIBRARY = torch.library.Library("llmtrain", "DEF")
_LIBRARY.define("linear_in_fp32(Tensor x, Tensor weight, Tensor? bias, ScalarType result) -> Tensor")

KERNELS = (
    torch.ops.llmtrain.linear_in_fp32.default,
    *(() if _ONEDNN is None else (_ONEDNN.default,)),
)
"""Operators that products are computed by, besides torch's `mm` and `addmm`."""

Way = Literal["torch", "onednn", "fp32"]
"""How to compute a product: by torch; by oneDNN directly; by torch in fp32, with the result rounded."""


@cache
def way_of(dtype: torch.dtype) -> Way:
    """Return the fastest method for large products of a dtype on this CPU.

    A fixed rule rather than a measurement, so that a resumed run is bit-exact: timings vary.
    """
    if dtype == torch.float32:
        avx512 = torch.backends.cpu.get_cpu_capability().startswith("AVX512")
        return "onednn" if avx512 and _vendor() == "AuthenticAMD" and _has_onednn() else "torch"
    is_supported = getattr(torch.ops.mkldnn, _SUPPORTED.get(dtype, ""), None)
    return "torch" if is_supported is None or is_supported() else "fp32"


_SUPPORTED = {torch.bfloat16: "_is_mkldnn_bf16_supported", torch.float16: "_is_mkldnn_fp16_supported"}
"""Operators that tell whether torch computes products of a dtype by oneDNN with the processor's
instructions."""


def computes_in_fp32(x: Tensor) -> bool:
    """Return whether products of x are computed in fp32 and rounded to x's dtype or autocast's."""
    return x.device.type == "cpu" and way_of(autocast_type(x)) == "fp32"


def autocast_type(x: Tensor) -> torch.dtype:
    """Return the dtype in which torch computes products of x here: autocast's, or x's own."""
    if x.is_floating_point() and torch.is_autocast_enabled(x.device.type):
        return torch.get_autocast_dtype(x.device.type)
    return x.dtype


class Linear(nn.Linear):
    """`nn.Linear` computed by `linear`."""

    def forward(self, x: Tensor) -> Tensor:
        return linear(x, self.weight, self.bias)


def linear(x: Tensor, weight_OI: Tensor, bias_O: Tensor | None = None) -> Tensor:
    """Return x·weightᵀ + bias as `F.linear` does, (…, I) → (…, O)."""
    way = _way(x, weight_OI)
    if way == "torch":
        return F.linear(x, weight_OI, bias_O)
    dtype = autocast_type(x)
    if torch.is_grad_enabled():
        y: Tensor = _Linear.apply(x, weight_OI, bias_O, way, dtype)
        return y
    return _product(way, x.to(dtype), weight_OI, bias_O, dtype)


def product(a_MI: Tensor, b_OI: Tensor) -> Tensor:
    """Return a·bᵀ, (M, O), without gradients."""
    way = _way(a_MI, b_OI)
    return a_MI @ b_OI.T if way == "torch" else _product(way, a_MI, b_OI, None, a_MI.dtype)


def add_product_(sum_MO: Tensor, a_MI: Tensor, b_OI: Tensor) -> None:
    """Add a·bᵀ to the sum, in place and without gradients; the sum may have a wider dtype."""
    way = _way(a_MI, b_OI)
    if way == "fp32":
        a_MI, b_OI = a_MI.to(sum_MO.dtype), b_OI.to(sum_MO.dtype)
    if way != "onednn" and sum_MO.dtype == a_MI.dtype:
        sum_MO.addmm_(a_MI, b_OI.T)
    else:
        sum_MO += product(a_MI, b_OI)


def bmm(a_PMI: Tensor, b_PIO: Tensor) -> Tensor:
    """Return `torch.bmm`, without gradients and autocast."""
    if not computes_in_fp32(a_PMI):
        return torch.bmm(a_PMI, b_PIO)
    return torch.bmm(a_PMI.float(), b_PIO.float()).to(a_PMI.dtype)


def einsum(equation: str, a: Tensor, b: Tensor) -> Tensor:
    """Return `torch.einsum` of two tensors. Each index of one must also be in the other or in the result."""
    if not computes_in_fp32(a):
        return torch.einsum(equation, a, b)
    dtype = autocast_type(a)
    y: Tensor = _EinsumInFp32.apply(equation, a.to(dtype), b.to(dtype))
    return y


class _Linear(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, x: Tensor, weight_OI: Tensor, bias_O: Tensor | None, way: Way, dtype: torch.dtype
    ) -> Tensor:
        ctx.way, ctx.x_dtype = way, x.dtype
        x = x.to(dtype)
        ctx.save_for_backward(x, weight_OI)
        y = _product(way, x, weight_OI, bias_O, dtype)
        # oneDNN returns a view for x of three dims; one returned by a Function can't be summed in place.
        out: Tensor = torch.ops.aten._unsafe_view(y, y.shape)
        return out

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, ...]:
        x, weight_OI = ctx.saved_tensors
        grad_MO = gradients[0].reshape(-1, weight_OI.shape[0])
        grad_x = grad_weight_OI = grad_bias_O = None
        if ctx.needs_input_grad[0]:
            grad_x = _product(ctx.way, grad_MO, weight_OI.T, None, ctx.x_dtype).view(x.shape)
        if ctx.needs_input_grad[1]:
            x_IM = x.reshape(-1, x.shape[-1]).T
            grad_weight_OI = _product(ctx.way, grad_MO.T, x_IM, None, weight_OI.dtype)
        if ctx.needs_input_grad[2]:
            grad_bias_O = grad_MO.sum(0, dtype=weight_OI.dtype)
        return grad_x, grad_weight_OI, grad_bias_O, None, None


class _EinsumInFp32(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, equation: str, a: Tensor, b: Tensor) -> Tensor:
        ctx.equation = equation
        ctx.save_for_backward(a, b)
        return _einsum_in_fp32(equation, a, b)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, ...]:
        a, b = ctx.saved_tensors
        of_both, of_result = ctx.equation.split("->")
        of_a, of_b = of_both.split(",")
        grad_a = grad_b = None
        if ctx.needs_input_grad[1]:
            grad_a = _einsum_in_fp32(f"{of_result},{of_b}->{of_a}", gradients[0], b)
        if ctx.needs_input_grad[2]:
            grad_b = _einsum_in_fp32(f"{of_result},{of_a}->{of_b}", gradients[0], a)
        return None, grad_a, grad_b


def _einsum_in_fp32(equation: str, a: Tensor, b: Tensor) -> Tensor:
    with torch.autocast("cpu", enabled=False):
        return torch.einsum(equation, a.float(), b.float()).to(b.dtype)


@contextmanager
def packed_weights() -> Iterator[None]:
    """Inside, keep a second copy of each weight, in oneDNN's layout or in fp32, from its first product on.
    Products with few rows then take 0.6 to 0.8 of their time. Weights must not change inside."""
    global _packed
    before, _packed = _packed, {}
    try:
        yield
    finally:
        _packed = before


_packed: dict[int, tuple[Tensor, Tensor]] | None = None
"""Id of a weight → (the weight, kept so that its id stays valid; its packed copy). None: not packing."""


def _prepared(way: Way, weight_OI: Tensor, dtype: torch.dtype) -> Tensor:
    """Return the weight, rounded to `dtype`, in the form that the method needs."""
    if _packed is None or not isinstance(weight_OI, nn.Parameter):
        return weight_OI.to(dtype)
    if id(weight_OI) not in _packed:
        weight = weight_OI.detach().to(dtype)
        packed = weight.float() if way == "fp32" else torch.ops.mkldnn._reorder_linear_weight(weight, None)
        _packed[id(weight_OI)] = (weight_OI, packed)
    return _packed[id(weight_OI)][1]


def _product(way: Way, x: Tensor, weight_OI: Tensor, bias_O: Tensor | None, result: torch.dtype) -> Tensor:
    """Return x·weightᵀ + bias in x's dtype, computed by oneDNN directly or in fp32."""
    weight_OI = _prepared(way, weight_OI, x.dtype)
    y: Tensor
    if way == "fp32":
        y = torch.ops.llmtrain.linear_in_fp32(x, weight_OI, bias_O, result)
    else:
        y = _ONEDNN(x, weight_OI, bias_O, "none", [], "")
    return y


def _linear_in_fp32(x: Tensor, weight_OI: Tensor, bias_O: Tensor | None, result: torch.dtype) -> Tensor:
    with torch.autocast("cpu", enabled=False):
        bias_O = None if bias_O is None else bias_O.float()
        return F.linear(x.float(), weight_OI.float(), bias_O).to(result)


_LIBRARY.impl("linear_in_fp32", _linear_in_fp32, "CPU")


def _way(x: Tensor, weight_OI: Tensor) -> Way:
    """Return the method; torch's for small products and for mixed dtypes, which torch refuses."""
    if x.device.type != "cpu" or x.numel() == 0:
        return "torch"
    if x.dtype != weight_OI.dtype and not torch.is_autocast_enabled("cpu"):
        return "torch"
    way = way_of(autocast_type(x))
    return "torch" if way == "onednn" and weight_OI.numel() < SMALLEST else way


@cache
def _has_onednn() -> bool:
    return _ONEDNN is not None and torch.backends.mkldnn.is_available()


@cache
def _vendor() -> str:
    """Return the vendor as an x86 processor reports it; empty if unknown."""
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return ""
    return next((line.partition(":")[2].strip() for line in lines if line.startswith("vendor_id")), "")
