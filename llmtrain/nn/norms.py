"""Norms of a transformer: for hidden states, and for queries and keys.

Dim names: N heads, H head width.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from llmtrain.nn.layer_config import LayerConfig


class OffsetRMSNorm(nn.RMSNorm):
    """RMS norm that multiplies by 1 + weight (Gemma), in fp32."""

    def forward(self, x: Tensor) -> Tensor:
        assert self.weight is not None
        y = F.rms_norm(x.float(), self.normalized_shape, 1.0 + self.weight.float(), self.eps)
        return y.to(x.dtype)


class AllHeadsNorm(nn.Module):
    """RMS norm over the dims of all heads together, (…, N, H) (OLMo 2).

    Its weight is divided like the heads; `sum_over_heads` then also sums over the heads of other ranks.
    """

    def __init__(self, num_heads: int, head_dim: int, eps: float) -> None:
        super().__init__()
        self.eps = eps
        self.width = num_heads * head_dim
        """Dims of all heads, including those of other ranks."""
        self.weight = nn.Parameter(torch.empty(num_heads * head_dim))

    def sum_over_heads(self, x: Tensor) -> Tensor:
        return x

    def forward(self, x_BTNH: Tensor) -> Tensor:
        x = x_BTNH.flatten(-2).float()
        squares = self.sum_over_heads(x.square().sum(-1, keepdim=True))
        y = x * torch.rsqrt(squares / self.width + self.eps) * self.weight
        return y.view(x_BTNH.shape)


def make_norm(config: LayerConfig) -> nn.Module:
    """Return a norm of hidden states."""
    if config.norm == "rmsnorm":
        return _rms_norm(config, config.hidden_size)
    return nn.LayerNorm(config.hidden_size, eps=config.norm_eps, bias=config.bias)


def make_head_norm(config: LayerConfig, num_heads: int) -> nn.Module:
    """Return a norm of queries or keys; over each head's dims as in ViT-22B (arXiv:2302.05442)."""
    if config.qk_norm_over == "all_heads":
        return AllHeadsNorm(num_heads, config.head_width, config.norm_eps)
    return _rms_norm(config, config.head_width)


def _rms_norm(config: LayerConfig, width: int) -> nn.Module:
    return (OffsetRMSNorm if config.norm_adds_one else nn.RMSNorm)(width, eps=config.norm_eps)
