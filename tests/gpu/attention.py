"""Packed documents by torch's kernel of variable lengths against attention with a mask, forward and backward.

On a CPU, which has no such kernel, a plain loop stands in for it.

Dim names: B rows, T tokens, N query heads, K key-value heads, H head width.
"""

from __future__ import annotations

from collections.abc import Iterator
from itertools import pairwise
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from llmtrain.nn import attention_kernels
from llmtrain.nn.documents import Documents
from tests.gpu.runs import distance, no_tf32
from tests.gpu.table import Row, judged

TOLERANCE = 1e-2
"""Relative, of outputs and of gradients in bf16 against a mask in fp32."""
SIZES = {"cuda": (4, 1024, 8, 64), "cpu": (2, 50, 4, 16)}
"""B, T, N, H."""


def check(device: str, folder: Path) -> Iterator[Row]:
    no_tf32()
    torch.manual_seed(0)
    B, T, N, H = SIZES[device]
    for key_heads in (N, N // 2):
        q, k, v = (
            torch.randn(B, heads, T, H, device=device, dtype=torch.bfloat16).requires_grad_()
            for heads in (N, key_heads, key_heads)
        )
        if device == "cuda" and attention_kernels.document_kernel(q, k, v) is None:
            yield Row("attention", f"{key_heads} key heads", "passed over", "this GPU has no such kernel")
            continue
        kernel = attention_kernels.document_kernel(q, k, v) or _one_by_one
        ids_BT = (torch.rand(B, T) < 8 / T).cumsum(1).to(device)
        for causal, window in ((True, None), (True, T // 8), (False, None)):
            documents = Documents(ids_BT, causal=causal, window=window)
            found = attention_kernels.attend_by_document(kernel, q, k, v, documents)
            expected = _masked(*(x.float() for x in (q, k, v)), documents.mask)
            weight = torch.randn_like(expected)
            ours = torch.autograd.grad((found.float() * weight).sum(), (q, k, v))
            theirs = torch.autograd.grad((expected * weight).sum(), (q, k, v))
            apart, of_gradients = distance([found], [expected]), distance(ours, theirs)
            name = f"{N} heads, {key_heads} of keys, {'causal' if causal else 'both ways'}"
            name += "" if window is None else f", window of {window}"
            detail = f"outputs {apart:.1e}, gradients {of_gradients:.1e} (at most {TOLERANCE:g})"
            yield judged("attention", name, max(apart, of_gradients) <= TOLERANCE, detail)


def _masked(q_BNTH: Tensor, k_BKTH: Tensor, v_BKTH: Tensor, mask_B1TT: Tensor) -> Tensor:
    groups = q_BNTH.shape[1] // k_BKTH.shape[1]
    k_BNTH, v_BNTH = (x.repeat_interleave(groups, dim=1) for x in (k_BKTH, v_BKTH))
    scores_BNTT = (q_BNTH @ k_BNTH.transpose(2, 3)) * q_BNTH.shape[-1] ** -0.5
    return scores_BNTT.masked_fill(~mask_B1TT, -torch.inf).softmax(-1) @ v_BNTH


def _one_by_one(
    q: Tensor, k: Tensor, v: Tensor, borders: Tensor, _k: Tensor, _q: int, _s: int, *, window_size: Any,
    enable_gqa: bool,
) -> Tensor:  # fmt: skip
    """What the kernel computes, a document at a time."""
    outputs = []
    for start, end in pairwise(borders.tolist()):
        back, ahead = window_size
        places_T = torch.arange(end - start)
        distances_TT = places_T[:, None] - places_T
        seen_TT = torch.ones_like(distances_TT, dtype=torch.bool)
        if ahead >= 0:
            seen_TT &= distances_TT >= -ahead
        if back >= 0:
            seen_TT &= distances_TT <= back
        q_NTH, k_KTH, v_KTH = (x[start:end].transpose(0, 1) for x in (q, k, v))
        y = F.scaled_dot_product_attention(q_NTH, k_KTH, v_KTH, attn_mask=seen_TT, enable_gqa=enable_gqa)
        outputs.append(y.transpose(0, 1))
    return torch.cat(outputs)
