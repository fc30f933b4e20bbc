"""Batch normalization (Ioffe and Szegedy 2015, arXiv:1502.03167).

Dim names: B batch, C channels; images have height and width after them.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor, nn

MOMENTUM = 0.1
"""Weight of a new batch in the running averages, as in torch and in He et al."""
EPS = 1e-5


class BatchNorm(nn.Module):
    """Normalizes each channel by mean and variance over a micro-batch; in evaluation by their running
    averages, which are buffers.

    Alone it computes what `nn.BatchNorm2d` does. `total` is set from outside where ranks share a batch
    (parallel/batch_norm.py): mean and variance are then those of all ranks' images.
    """

    running_mean: Tensor
    running_var: Tensor

    def __init__(self, channels: int, synchronized: bool = True) -> None:
        """synchronized: whether ranks may share the statistics of their micro-batches."""
        super().__init__()
        self.weight = nn.Parameter(torch.empty(channels))
        self.bias = nn.Parameter(torch.empty(channels))
        self.register_buffer("running_mean", torch.empty(channels))
        self.register_buffer("running_var", torch.empty(channels))
        self.synchronized = synchronized
        self.total: Callable[[Tensor], Tensor] | None = None
        """Sum over ranks, with gradients."""

    def forward(self, x: Tensor) -> Tensor:
        """Return x (B, C, H, W) or (B, C) normalized, in its dtype."""
        if self.training and self.total is not None:
            return self._over_ranks(x, self.total)
        statistics = self.running_mean, self.running_var
        return F.batch_norm(x, *statistics, self.weight, self.bias, self.training, MOMENTUM, EPS)

    def _over_ranks(self, x: Tensor, total: Callable[[Tensor], Tensor]) -> Tensor:
        values = x.float()
        dims = [0, *range(2, x.ndim)]
        shape = [1, -1, *[1] * (x.ndim - 2)]
        own = values.new_full((1,), x.numel() / x.shape[1])
        sums = total(torch.cat([values.sum(dims), own]))
        count = sums[-1].detach()
        mean_C = sums[:-1] / count
        # Squared differences rather than the mean square: no digits cancel.
        centered = values - mean_C.view(shape)
        variance_C = total(centered.square().sum(dims)) / count
        with torch.no_grad():
            self.running_mean.lerp_(mean_C, MOMENTUM)
            self.running_var.lerp_(variance_C * (count / (count - 1)), MOMENTUM)
        scale_C = self.weight * torch.rsqrt(variance_C + EPS)
        return (centered * scale_C.view(shape) + self.bias.view(shape)).to(x.dtype)
