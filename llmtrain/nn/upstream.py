"""Access to parts of torch that differ between supported versions or are private and may be removed."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from functools import cache
from typing import Any

import torch
from torch import Tensor


@cache
def varlen_kernel() -> Callable[..., Any] | None:
    """Return torch's varlen_attn as of torch 2.13, including `enable_gqa`, or None if this torch has none.

    The first call takes seconds, since it imports torch's compiler.
    """
    try:
        from torch.nn.attention.varlen import varlen_attn
    except ImportError:
        return None
    knows_groups = "enable_gqa" in inspect.signature(varlen_attn).parameters
    return varlen_attn if knows_groups else _repeating_heads(varlen_attn)


def _repeating_heads(kernel: Callable[..., Any]) -> Callable[..., Any]:
    """Return `kernel` of torch 2.11, which needs as many keys as queries, with support for fewer."""

    def attend(q: Tensor, k: Tensor, v: Tensor, *rest: Any, enable_gqa: bool, **settings: Any) -> Any:
        if enable_gqa:
            k, v = (x.repeat_interleave(q.shape[1] // x.shape[1], dim=1) for x in (k, v))
        return kernel(q, k, v, *rest, **settings)

    return attend


def softmax_backward(grad_probs: Tensor, probs: Tensor, dtype: torch.dtype) -> Tensor:
    """Return the gradient, in `dtype`, of the input of a softmax over the last dim with output `probs`."""
    in_one_pass = getattr(torch, "_softmax_backward_data", None)
    if in_one_pass is None:
        product = grad_probs * probs
        return (product - probs * product.sum(-1, keepdim=True)).to(dtype)
    grad: Tensor = in_one_pass(grad_probs, probs, -1, dtype)
    return grad
