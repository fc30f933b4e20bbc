"""Learned biases of attention by the distance from query to key.

Dim names: N heads, T queries, S keys, R buckets.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable


class PerHead(nn.Module):
    """A learned vector for each head, (N, width): biases of positions, vectors added to queries.

    Its rows are divided like the heads; forward returns those of this rank.
    """

    def __init__(self, num_heads: int, width: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.empty(num_heads, width))

    def forward(self) -> Tensor:
        """Return (N, width)."""
        return self.weight


@dataclass(frozen=True)
class RelativePositions:
    """Learned attention biases by the distance from query to key: near distances have one each, farther
    ones share buckets (T5, arXiv:1910.10683, section 2.1)."""

    num_buckets: int = 32
    max_distance: int = 128
    """Distance, in tokens, from which on all share the last bucket."""

    def buckets(self, distances: Tensor, *, both_ways: bool) -> Tensor:
        """Return the bucket of each distance, key − query, int64. If both_ways, the first half is for keys
        up to the query and the second for later ones; else all are for keys up to the query."""
        count = self.num_buckets // 2 if both_ways else self.num_buckets
        first = (distances > 0) * count if both_ways else torch.zeros_like(distances)
        n = distances.abs() if both_ways else (-distances).clamp(min=0)
        exact = count // 2
        octaves = torch.log(n.clamp(min=1).float() / exact) / math.log(self.max_distance / exact)
        shared = (exact + (octaves * (count - exact)).long()).clamp(max=count - 1)
        return first + torch.where(n < exact, n, shared)

    def bias(self, weight_NR: Tensor, T: int, S: int, *, both_ways: bool) -> Tensor:
        """Return the biases of the scores of the last T of S tokens with all of them, (N, T, S).
        `weight_NR` holds each head's bias for each bucket."""
        # Always on the CPU: another logarithm may round to the next bucket at a bucket's border.
        buckets_D = self.buckets(torch.arange(1 - S, T, device="cpu"), both_ways=both_ways)
        along_ND = weight_NR[:, buckets_D.to(weight_NR.device)]
        bias_NTS: Tensor = _ByDistance.apply(along_ND, T)
        return bias_NTS


class _ByDistance(torch.autograd.Function):
    """Expand (N, S + T − 1), values for distances from 1 − S up, to (N, T, S), values for s − (S − T + t)."""

    @staticmethod
    def forward(ctx: Any, along_ND: Tensor, T: int) -> Tensor:
        return along_ND.unfold(1, along_ND.shape[1] - T + 1, 1).flip(1)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, None]:
        (grad_NTS,) = gradients
        N, T, S = grad_NTS.shape
        # Read with one column less, each row is shifted right by one, so that diagonals become columns.
        padded = grad_NTS.new_zeros(N, T, S + T)
        padded[:, :, :S] = grad_NTS.flip(1)
        sheared = padded.flatten(1)[:, : T * (S + T - 1)].unflatten(1, (T, S + T - 1))
        return sheared.sum(1), None
