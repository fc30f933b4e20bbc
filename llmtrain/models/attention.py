"""Scaled dot-product attention: torch's kernel, and on the CPU a faster one for causal training.

torch's CPU kernel computes the masked upper triangle and multiplies in fp32. Blocks of queries, each
with the keys that it can see, are exact too and take plain matrix products of the inputs' type: over
forward and backward at T = 512, H = 64 they take 0.75 of its time in fp32 and 0.38 in bf16.

Dim names: B batch, N query heads, K key-value heads, T queries, S keys, H head width, C queries of a
block, P = B·N.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable

from llmtrain.models.dropout import AttentionDropout

BLOCK = 128
"""Queries of a block: of 64, 128 and 256 the fastest."""
LONGEST = 2048
"""Beyond it the probabilities, which are kept for backward, take too much room: B·N·T²/2 elements."""


def attend(
    q_BNTH: Tensor,
    k_BKSH: Tensor,
    v_BKSH: Tensor,
    *,
    mask: Tensor | None = None,
    dropout: AttentionDropout | None = None,
) -> Tensor:
    """softmax(q·kᵀ / sqrt(H))·v, (B, N, T, H), laid out as (B, T, N, H).

    mask: (B or 1, 1, T, S), True where a query may see a key, and within the causal triangle when
        T = S. None: causal when T = S; one query alone sees every key.
    dropout: of the softmax' weights. With keys the weights are held whole, (B, N, T, S), as no kernel
        takes masks of one's own.
    """
    N, T = q_BNTH.shape[1:3]
    K, S = k_BKSH.shape[1:3]
    if q_BNTH.device.type == "cpu" and 1 < T == S <= LONGEST and dropout is None:
        if N != K:
            k_BKSH, v_BKSH = (x.repeat_interleave(N // K, dim=1) for x in (k_BKSH, v_BKSH))
        y_BNTH: Tensor = _BlockwiseAttention.apply(q_BNTH, k_BKSH, v_BKSH, mask, torch.is_grad_enabled())
        return y_BNTH
    if dropout is not None and dropout.keys is not None:
        return _attend_with_mask_of_dropout(q_BNTH, k_BKSH, v_BKSH, mask, dropout)
    return F.scaled_dot_product_attention(
        q_BNTH,
        k_BKSH,
        v_BKSH,
        attn_mask=mask,
        dropout_p=0.0 if dropout is None else dropout.p,
        # One new token sees every key; is_causal would show it the first alone.
        is_causal=mask is None and T > 1,
        enable_gqa=N != K,
    )


def _attend_with_mask_of_dropout(
    q_BNTH: Tensor, k_BKSH: Tensor, v_BKSH: Tensor, mask: Tensor | None, dropout: AttentionDropout
) -> Tensor:
    N, T, H = q_BNTH.shape[1:]
    K, S = k_BKSH.shape[1:3]
    if N != K:
        k_BKSH, v_BKSH = (x.repeat_interleave(N // K, dim=1) for x in (k_BKSH, v_BKSH))
    if mask is None and T > 1:
        mask = torch.ones(T, S, dtype=torch.bool, device=q_BNTH.device).tril(S - T)
    scores_BNTS = (q_BNTH * H**-0.5) @ k_BKSH.transpose(2, 3)
    if mask is not None:
        scores_BNTS = scores_BNTS.masked_fill(~mask, -torch.inf)
    probs_BNTS = scores_BNTS.softmax(-1).to(v_BKSH.dtype)
    y_BNTH = (probs_BNTS * dropout.scaled_mask(N, T, S, probs_BNTS.dtype)) @ v_BKSH
    return y_BNTH.transpose(1, 2).contiguous().transpose(1, 2)


class _BlockwiseAttention(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, q_BNTH: Tensor, k_BNTH: Tensor, v_BNTH: Tensor, mask: Tensor | None, with_gradients: bool
    ) -> Tensor:
        B, N, T, H = q_BNTH.shape
        q_PTH = (q_BNTH * H**-0.5).reshape(B * N, T, H)
        k_PTH, v_PTH = k_BNTH.reshape(B * N, T, H), v_BNTH.reshape(B * N, T, H)
        y_BNTH = q_BNTH.new_empty(B, T, N, H).transpose(1, 2)
        future_CC = torch.ones(BLOCK, BLOCK, dtype=torch.bool).triu(1)
        probs = []
        with torch.autocast("cpu", enabled=False):
            for start in range(0, T, BLOCK):
                end = min(T, start + BLOCK)
                C = end - start
                scores_PCS = torch.bmm(q_PTH[:, start:end], k_PTH[:, :end].transpose(1, 2))
                if mask is None:
                    scores_PCS[:, :, start:].masked_fill_(future_CC[:C, :C], -torch.inf)
                else:
                    hidden = ~mask[:, :, start:end, :end]
                    scores_PCS.view(B, N, C, end).masked_fill_(hidden, -torch.inf)
                probs_PCS = scores_PCS.softmax(-1)
                y_BNTH[:, :, start:end] = torch.bmm(probs_PCS, v_PTH[:, :end]).view(B, N, C, H)
                if with_gradients:
                    probs.append(probs_PCS)
        if with_gradients:
            ctx.save_for_backward(q_PTH, k_PTH, v_PTH, *probs)
        return y_BNTH

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, ...]:
        (grad_BNTH,) = gradients
        q_PTH, k_PTH, v_PTH, *probs = ctx.saved_tensors
        shape, dtype = grad_BNTH.shape, q_PTH.dtype
        T, H = shape[2:]
        grad_PTH = grad_BNTH.reshape(q_PTH.shape).to(dtype)
        grad_q_PTH = torch.empty_like(q_PTH)
        # fp32: a key gathers from as many blocks as see it.
        grad_k_PTH = torch.zeros(k_PTH.shape, dtype=torch.float32)
        grad_v_PTH = torch.zeros_like(grad_k_PTH)
        with torch.autocast("cpu", enabled=False):
            for probs_PCS, start in zip(probs, range(0, T, BLOCK), strict=True):
                end = min(T, start + BLOCK)
                grad_PCH = grad_PTH[:, start:end]
                grad_v_PTH[:, :end] += torch.bmm(probs_PCS.transpose(1, 2), grad_PCH)
                grad_probs_PCS = torch.bmm(grad_PCH, v_PTH[:, :end].transpose(1, 2))
                grad_scores_PCS = torch._softmax_backward_data(grad_probs_PCS, probs_PCS, -1, dtype)
                grad_q_PTH[:, start:end] = torch.bmm(grad_scores_PCS, k_PTH[:, :end])
                grad_k_PTH[:, :end] += torch.bmm(grad_scores_PCS.transpose(1, 2), q_PTH[:, start:end])
        grad_q_PTH *= H**-0.5
        return (
            grad_q_PTH.view(shape),
            grad_k_PTH.to(dtype).view(shape),
            grad_v_PTH.to(dtype).view(shape),
            None,
            None,
        )
