"""Time of attention by kernel, without the matrices before and after it.

Flash attention (arXiv:2205.14135, 2307.08691) multiplies tiles that stay on the multiprocessor; its backward
pass makes five products where the forward pass makes two. The older way writes the scores of all pairs to
memory, and reads them again for the softmax, dropout and the product with the values (arXiv:2205.05198,
section 4.1).
"""

from __future__ import annotations

from dataclasses import dataclass

from llmtrain.plan.times.device import Device
from llmtrain.plan.times.products import product_seconds

FLASH_BACKWARD = 2.5
"""FLOPs of a flash kernel's backward pass, as a multiple of those of its forward pass (arXiv:2307.08691,
section 4.1)."""
FIRST_FLASH = 0.5
"""Rate of the first FlashAttention, as a fraction of that of the second (arXiv:2307.08691, section 4.1: about
twice)."""
FLASH_BLOCK = 128
"""Keys of a tile: in the causal triangle, each row of tiles computes one half of them in vain."""
WIDTH_OF_HALF = 32
"""Head width at which a flash kernel reaches half its rate: 64 reaches five sixths of what 128 does, as in
figures 4 and 5 of arXiv:2307.08691."""
LENGTH_OF_HALF = 256
"""Sequence length at which it reaches half its rate; as in the same figures."""

MASK_BYTES = 13 * 8
"""Bytes that the operations of a hash in 32 bits read and write for each element of a mask (`_signs` of
nn/dropout.py)."""


@dataclass(frozen=True)
class Call:
    """Attention of one layer over one micro-batch on one rank."""

    rows: int
    queries: int
    """Tokens of a row, whose attention this rank computes for its heads."""
    keys: float
    """Keys that a token sees on average."""
    heads: int
    head_width: int
    dropout: bool
    kernel: str
    """flash, flash1, blockwise or all_scores."""
    causal: bool = True
    fused: bool = True
    """Whether scaling, mask and softmax of all scores are one operation."""
    keyed_masks: bool = False
    """Whether dropout's masks are hashes of keys, each operation of which goes over all elements."""


def attention_seconds(device: Device, call: Call) -> tuple[float, float]:
    """Return the time of the forward and of the backward pass."""
    if call.kernel == "blockwise":
        return _blockwise(device, call)
    return _all_scores(device, call) if call.kernel == "all_scores" else _flash(device, call)


def _flash(device: Device, call: Call) -> tuple[float, float]:
    wasted = FLASH_BLOCK / 2 if call.causal else 0
    pairs = call.rows * call.queries * min(float(call.queries), call.keys + wasted) * call.heads
    width, length = call.head_width, call.queries
    of_width = width / (width + WIDTH_OF_HALF) * (128 + WIDTH_OF_HALF) / 128
    of_length = length / (length + LENGTH_OF_HALF)
    rate = device.peak * device.efficiency.attention * of_width * of_length
    if call.kernel == "flash1":
        rate *= FIRST_FLASH
    forward = 4 * pairs * call.head_width / rate
    return forward, FLASH_BACKWARD * forward


def _blockwise(device: Device, call: Call) -> tuple[float, float]:
    """As all scores, of the keys alone that a block of queries sees."""
    forward, backward = _all_scores(device, call)
    seen = min(1.0, (call.keys + FLASH_BLOCK / 2) / call.queries)
    return seen * forward, seen * backward


def _all_scores(device: Device, call: Call) -> tuple[float, float]:
    batch, length = call.rows * call.heads, call.queries
    scores = product_seconds(device, length, length, call.head_width, batch)
    context = product_seconds(device, length, call.head_width, length, batch)
    gradients = product_seconds(device, length, call.head_width, length, batch)
    # The softmax reads scores and writes probabilities; dropout reads, writes and keeps a mask of bytes.
    passes = 2 * device.function_bytes + (2 * device.number_bytes + 1 if call.dropout else 0)
    softmax = device.traffic_seconds(batch * length * length * passes)
    softmax *= 1.0 if call.fused else device.efficiency.unfused
    if call.dropout and call.keyed_masks:
        context += device.traffic_seconds(batch * length * length * MASK_BYTES)
    return scores + context + softmax, scores + context + 2 * gradients + 1.5 * softmax
