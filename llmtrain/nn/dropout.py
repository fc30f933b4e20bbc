"""Dropout whose mask is a function of (sample, layer, position), not of a generator's state.

A mask from a generator depends on the rest of the batch and on how a tensor is divided over ranks. Here a
hash of the sample's key, the layer number and the element's position in the whole activation decides whether
it is dropped, so that every layout, micro-batch and recomputation drops the same elements.

Dim names: B batch, T sequence, D hidden width, N heads, S keys.
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

ATTENTION, HIDDEN = 0, 1
"""Kinds of masks in a layer; further hidden masks of a layer are numbered on from HIDDEN."""


def sample_keys(seed: int, samples: Sequence[int]) -> Tensor:
    """Return the key of each sample, 31 bits in int64 (B,), from its number in the global order, which is
    unique in a run."""
    digests = (
        hashlib.blake2b(f"dropout/{seed}/{sample}".encode(), digest_size=4).digest() for sample in samples
    )
    return torch.tensor([int.from_bytes(digest, "little") >> 1 for digest in digests], dtype=torch.int64)


class Dropout(nn.Module):
    """Drops elements of (B, T, D) with probability `p` and scales the others by 1 / (1 − p)."""

    def __init__(self, p: float, layer: int, kind: int) -> None:
        super().__init__()
        self.p, self.layer, self.kind = p, layer, kind
        self.sequence_part = 0
        """Which of the equal parts of the sequence the activations are, if ranks share sequences."""
        self.first_column = 0
        """Index in the whole activations of the first of their columns, if ranks share these."""

    def forward(self, x_BTD: Tensor, keys_B: Tensor | None = None) -> Tensor:
        """Drop elements by masks from the keys; without keys, by torch's generator."""
        if not self.training or self.p == 0.0:
            return x_BTD
        if keys_B is None:
            return F.dropout(x_BTD, self.p)
        T, D = x_BTD.shape[1:]
        keys = _mixed(keys_B, self.layer, self.kind)
        kept_BTD = keep(keys, self.sequence_part * T, T, D, self.p, self.first_column)
        return x_BTD * kept_BTD.to(x_BTD.dtype).mul_(1.0 / (1.0 - self.p))

    def extra_repr(self) -> str:
        return f"p={self.p}"


@dataclass(frozen=True)
class AttentionDropout:
    """Drops softmax probabilities of one layer, (B, N, T, S), with probability `p`."""

    p: float
    layer: int
    keys: Tensor | None
    """Keys of the samples, (B,); None: the masks come from torch's generator."""
    first_head: int = 0
    """Index in the whole layer of the first head held here."""

    def scaled_mask(self, N: int, T: int, S: int, dtype: torch.dtype) -> Tensor:
        """Return 0 where a probability is dropped, 1 / (1 − p) elsewhere: (B, N, T, S). Needs keys."""
        assert self.keys is not None
        heads = torch.arange(self.first_head, self.first_head + N, device=self.keys.device)
        keys_BN = _mix(_mixed(self.keys, self.layer, ATTENTION)[:, None] + heads * _STEP_ROW)
        return keep(keys_BN, 0, T, S, self.p).to(dtype).mul_(1.0 / (1.0 - self.p))


def keep(keys: Tensor, first_row: int, rows: int, columns: int, p: float, first_column: int = 0) -> Tensor:
    """Return True with probability 1 − p, as a function of (key, row, column): (…, rows, columns) for keys
    (…)."""
    device = keys.device
    row = torch.arange(first_row, first_row + rows, device=device)
    row_keys = _mix(keys[..., None] + row * _STEP_ROW).to(torch.int32)[..., None]
    column = torch.arange(first_column, first_column + columns, device=device)
    column = (column * _STEP_COLUMN).to(torch.int32)
    if device.type != "cpu" or row_keys.numel() * columns <= CACHED_ELEMENTS:
        return _is_kept(row_keys, column, p)
    kept = torch.empty(*row_keys.shape[:-1], columns, dtype=torch.bool)
    flat_keys, flat_kept = row_keys.reshape(-1, 1), kept.view(-1, columns)
    size = max(1, CACHED_ELEMENTS // columns)
    for start in range(0, len(flat_keys), size):
        chunk = slice(start, start + size)
        flat_kept[chunk] = _is_kept(flat_keys[chunk], column, p)
    return kept


def _is_kept(row_keys: Tensor, column: Tensor, p: float) -> Tensor:
    # In place and in 32 bits, since it covers all elements; multiplications wrap.
    x = row_keys ^ column
    x.mul_(_FACTOR).bitwise_xor_((x >> 15) & 0x1FFFF).mul_(_SECOND_FACTOR)
    x.bitwise_xor_((x >> 13) & 0x7FFFF).bitwise_and_(0x7FFFFFFF)
    return x >= int(p * 2**31)


CACHED_ELEMENTS = 2**15
"""Elements of a mask that a CPU computes at once, so that they stay in its cache through all operations; so
few torch does not divide over threads."""

_STEP_ROW, _STEP_COLUMN = 0x9E3779B1, 0x5EB5A7
_FACTOR, _SECOND_FACTOR = 0x2C1B3C6D, 0x297A2D39


def _mixed(keys_B: Tensor, layer: int, kind: int) -> Tensor:
    return _mix(keys_B + (layer * 8 + kind + 1) * _STEP_ROW)


def _mix(x: Tensor) -> Tensor:
    """Return a 31-bit hash of 32 bits, in int64 arithmetic (Wellons' lowbias32)."""
    x = x & 0xFFFFFFFF
    x = ((x ^ (x >> 16)) * 0x7FEB352D) & 0xFFFFFFFF
    x = ((x ^ (x >> 15)) * 0x846CA68B) & 0xFFFFFFFF
    return (x ^ (x >> 16)) & 0x7FFFFFFF
