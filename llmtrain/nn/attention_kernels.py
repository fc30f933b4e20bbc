"""Attention kernels over whole tensors: packed documents on a GPU, all scores, and torch's own.

The blockwise kernel is in attention_blocks.py. Arguments are those of `attend` in attention.py.
Dim names: B batch, N query heads, K key-value heads, T queries, S keys, H head width.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.backends.cuda import SDPAParams, can_use_flash_attention

from llmtrain.nn.documents import Documents
from llmtrain.nn.dropout import AttentionDropout
from llmtrain.nn.linear import autocast_type, computes_in_fp32, einsum
from llmtrain.nn.upstream import varlen_kernel


def repeat_heads(x_BKSH: Tensor, N: int) -> Tensor:
    """Return the keys or values repeated for each of N query heads, (B, N, S, H)."""
    K = x_BKSH.shape[1]
    return x_BKSH if K == N else x_BKSH.repeat_interleave(N // K, dim=1)


def document_kernel(q_BNTH: Tensor, k_BKTH: Tensor, v_BKTH: Tensor) -> Callable[..., Any] | None:
    """Return torch's flash attention over packed documents, or None if it cannot run: it needs a GPU of
    compute capability 8.0 or more, fp16 or bf16, and a head width that is a multiple of 8."""
    if q_BNTH.device.type != "cuda" or q_BNTH.shape[-1] % 8:
        return None
    different_heads = q_BNTH.shape[1] != k_BKTH.shape[1]
    if not can_use_flash_attention(SDPAParams(q_BNTH, k_BKTH, v_BKTH, None, 0.0, True, different_heads)):
        return None
    return varlen_kernel()


def attend_by_document(
    kernel: Callable[..., Any], q_BNTH: Tensor, k_BKTH: Tensor, v_BKTH: Tensor, documents: Documents
) -> Tensor:
    """Return attention within each document. `kernel`, varlen_attn or one with its signature, gets the
    tokens of all rows concatenated."""
    B, N, T = q_BNTH.shape[:3]
    borders, longest = documents.borders
    q, k, v = (x.transpose(1, 2).flatten(0, 1) for x in (q_BNTH, k_BKTH, v_BKTH))
    back = -1 if documents.window is None else documents.window - 1
    window = (back, 0) if documents.causal else (-1, -1)
    gqa = k_BKTH.shape[1] != N
    y: Tensor = kernel(q, k, v, borders, borders, longest, longest, window_size=window, enable_gqa=gqa)
    return y.unflatten(0, (B, T)).transpose(1, 2)


def attend_with_all_scores(
    q_BNTH: Tensor,
    k_BKSH: Tensor,
    v_BKSH: Tensor,
    mask: Tensor | None,
    dropout: AttentionDropout | None,
    causal: bool,
    scale: float | None,
    bias_NTS: Tensor | None,
    softcap: float | None,
) -> Tensor:
    """Return attention by plain operations, holding all scores, (B, N, T, S).

    mask: (…, T, S), True where a query sees a key; None with `causal`: each query sees the keys up to its
        own, T = S.
    """
    N, T, H = q_BNTH.shape[1:]
    S = k_BKSH.shape[2]
    k_BNSH, v_BNSH = repeat_heads(k_BKSH, N), repeat_heads(v_BKSH, N)
    if causal and mask is None and T > 1:
        mask = torch.ones(T, S, dtype=torch.bool, device=q_BNTH.device).tril()
    q_BNTH = q_BNTH * (H**-0.5 if scale is None else scale)
    scores_BNTS = einsum("bnth,bnsh->bnts", q_BNTH, k_BNSH)
    if softcap is not None:
        scores_BNTS = softcap * torch.tanh(scores_BNTS / softcap)
    if bias_NTS is not None:
        scores_BNTS = scores_BNTS + bias_NTS.to(scores_BNTS.dtype)
    if mask is not None:
        scores_BNTS = scores_BNTS.masked_fill(~mask, -torch.inf)
    probs_BNTS = scores_BNTS.softmax(-1).to(v_BNSH.dtype)
    if dropout is not None and dropout.keys is not None:
        probs_BNTS = probs_BNTS * dropout.scaled_mask(N, T, S, probs_BNTS.dtype)
    elif dropout is not None:
        probs_BNTS = F.dropout(probs_BNTS, dropout.p)
    y_BNTH = einsum("bnts,bnsh->bnth", probs_BNTS, v_BNSH)
    return y_BNTH.transpose(1, 2).contiguous().transpose(1, 2)


def attend_by_torch(
    q_BNTH: Tensor,
    k_BKSH: Tensor,
    v_BKSH: Tensor,
    mask: Tensor | None,
    dropout: AttentionDropout | None,
    causal: bool,
    scale: float | None,
    bias_NTS: Tensor | None,
) -> Tensor:
    """Return scaled_dot_product_attention, computed in fp32 if the CPU has no products of the inputs' dtype.

    mask: (…, T, S), True where a query sees a key; None with `causal`: each query sees the keys up to its
        own (T = S), or all of them (T = 1).
    """
    N, T = q_BNTH.shape[1:3]
    if bias_NTS is not None:
        bias_NTS = bias_NTS.to(q_BNTH.dtype)
        mask = bias_NTS[None] if mask is None else bias_NTS.masked_fill(~mask, -torch.inf)
    kernel = functools.partial(
        F.scaled_dot_product_attention,
        dropout_p=0.0 if dropout is None else dropout.p,
        # A single query sees every key; torch's is_causal would show it only the first.
        is_causal=causal and mask is None and T > 1,
        scale=scale,
        enable_gqa=k_BKSH.shape[1] != N,
    )
    if not computes_in_fp32(q_BNTH):
        return kernel(q_BNTH, k_BKSH, v_BKSH, attn_mask=mask)
    dtype = autocast_type(q_BNTH)
    if mask is not None and mask.is_floating_point():
        mask = mask.float()
    with torch.autocast("cpu", enabled=False):
        return kernel(q_BNTH.float(), k_BKSH.float(), v_BKSH.float(), attn_mask=mask).to(dtype)
