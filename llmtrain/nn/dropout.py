"""Dropout whose mask is a function of (sample, layer, position), not of a generator's state.

A mask from a generator depends on the rest of the batch and on how a tensor is divided over ranks. Here a
hash of the sample's key, the layer number and the element's position in the whole activation decides whether
it is dropped, so that every layout, micro-batch and recomputation drops the same elements.

Dim names: B batch, T sequence, D hidden width, N heads, S keys.
"""

from __future__ import annotations

import hashlib
import struct
from collections.abc import Iterator, Sequence
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

    def forward(self, x_BTD: Tensor, keys_B: Tensor | None = None, places_BT: Tensor | None = None) -> Tensor:
        """Drop elements by masks from the keys; without keys, by torch's generator.

        places_BT: position in its sequence of each token of x; None: they are counted.
        """
        if not self.training or self.p == 0.0:
            return x_BTD
        if keys_B is None:
            return F.dropout(x_BTD, self.p)
        T, D = x_BTD.shape[1:]
        if places_BT is None:
            first = self.sequence_part * T
            places_BT = torch.arange(first, first + T, device=keys_B.device)
        rows_BT = row_keys(_mixed(keys_B, self.layer, self.kind), places_BT)
        return x_BTD * scaled_mask(rows_BT, D, self.p, x_BTD.dtype, self.first_column)

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

    places: Tensor | None = None
    """Position in its sequence of each query, (B, T); None: they are counted from 0."""

    @property
    def scale(self) -> float:
        """Return the factor of what is kept."""
        return 1.0 / (1.0 - self.p)

    def row_keys(self, N: int, T: int) -> Tensor:
        """Return the keys of the masks of T queries, int32 (B, N, T). Needs keys."""
        assert self.keys is not None
        heads = torch.arange(self.first_head, self.first_head + N, device=self.keys.device)
        keys_BN = _mix(_mixed(self.keys, self.layer, ATTENTION)[:, None] + heads * _STEP_ROW)
        places = torch.arange(T, device=self.keys.device) if self.places is None else self.places[:, None]
        return row_keys(keys_BN, places)

    def scaled_mask(self, N: int, T: int, S: int, dtype: torch.dtype) -> Tensor:
        """Return 0 where a probability is dropped, 1 / (1 − p) elsewhere: (B, N, T, S). Needs keys."""
        return scaled_mask(self.row_keys(N, T), S, self.p, dtype)


def row_keys(keys: Tensor, rows: Tensor) -> Tensor:
    """Return a key for each row of each mask, int32 (…, rows), from a key for each mask, (…), and the numbers
    of its rows, (rows) or (…, rows)."""
    return _mix(keys[..., None] + rows * _STEP_ROW).to(torch.int32)


def scaled_mask(
    row_keys: Tensor, columns: int, p: float, dtype: torch.dtype, first_column: int = 0
) -> Tensor:
    """Return 0 with probability p and else 1 / (1 − p), as a function of (key of the row, column): (…,
    columns) for keys (…)."""
    mask = torch.empty(*row_keys.shape, columns, dtype=dtype, device=row_keys.device)
    (scale_bits,) = struct.unpack("i", struct.pack("f", 1.0 / (1.0 - p)))
    for part, signs in _signs(row_keys.flatten(), columns, p, first_column):
        # All bits where kept, none where dropped.
        mask.view(-1, columns)[part] = (
            signs.bitwise_right_shift_(31).bitwise_not_().bitwise_and_(scale_bits).view(torch.float32)
        )
    return mask


def mark_dropped_(values: Tensor, row_keys: Tensor, p: float, first_column: int = 0) -> None:
    """Give a minus to those of `values`, which are not negative, that `scaled_mask` drops, in place.

    values: (M, columns), contiguous; row_keys: (M).
    """
    for part, signs in _signs(row_keys, values.shape[1], p, first_column):
        values[part].copysign_(signs.view(torch.float32) if values.dtype == torch.float32 else signs)


def _signs(row_keys_M: Tensor, columns: int, p: float, first_column: int) -> Iterator[tuple[slice, Tensor]]:
    """Yield consecutive rows of a mask, each time with their elements in a buffer, int32 (rows, columns),
    that are negative where the mask drops; the receiver may write to it."""
    M, device = len(row_keys_M), row_keys_M.device
    column = torch.arange(first_column, first_column + columns, device=device)
    column = (column * _STEP_COLUMN).to(torch.int32)
    size = max(1, M)
    if device.type == "cpu":
        size = max(1, min(M, CACHED_ELEMENTS * torch.get_num_threads() // max(1, columns)))
    signs, shifted = torch.empty(2, size, columns, dtype=torch.int32, device=device)
    for start in range(0, M, size):
        part = slice(start, min(start + size, M))
        x, y = (buffer[: part.stop - start] for buffer in (signs, shifted))
        # In place and in 32 bits, since it covers all elements; multiplications wrap.
        torch.bitwise_xor(row_keys_M[part, None], column, out=x)
        x.mul_(_FACTOR)
        torch.bitwise_right_shift(x, 15, out=y)
        x.bitwise_xor_(y.bitwise_and_(0x1FFFF)).mul_(_SECOND_FACTOR)
        torch.bitwise_right_shift(x, 13, out=y)
        x.bitwise_xor_(y.bitwise_and_(0x7FFFF)).bitwise_and_(0x7FFFFFFF)
        yield part, x.sub_(int(p * 2**31))


CACHED_ELEMENTS = 2**15
"""Elements of a mask that a thread of a CPU computes at once, so that they stay in its cache through all
operations."""

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
