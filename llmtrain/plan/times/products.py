"""Time of a matrix product by its shape.

A GPU divides the result into tiles, which its multiprocessors compute in waves; a last wave that is not full
costs as much as a full one, and a short inner dimension leaves the units waiting for the first operands
(NVIDIA, Matrix Multiplication Background User's Guide, "tile quantization", "wave quantization" and "tensor
core requirements"). Products of few rows are bound by the memory that they read (roofline, Williams et al.
2009).
"""

from __future__ import annotations

import math
from functools import lru_cache

from llmtrain.plan.times.device import Device

TILES = ((256, 128, 1.0), (128, 128, 0.95), (128, 64, 0.8), (64, 64, 0.6))
"""Rows and columns of a tile, and the share of the best tile's rate that it reaches (as measured for cuBLAS
in the guide above: smaller tiles reuse operands less)."""
ALIGNED_BYTES = 16
UNALIGNED = 0.3
"""Share of the rate of a product whose rows do not begin at multiples of ALIGNED_BYTES (the same guide)."""
UNALIGNED_BATCH = 0.1
"""The same of many products at once, as those of attention's heads: heads of 108 dims made layers of 13,824 a
third slower in BLOOM's trials than heads of 144 did (bigscience-workshop/bigscience, tr11-176B-ml). Set by
hand after these trials."""


@lru_cache(maxsize=65536)
def product_seconds(device: Device, rows: int, columns: int, depth: int, count: int = 1) -> float:
    """Return the time of `count` products (rows, depth) · (depth, columns) at once."""
    rate = device.peak * device.efficiency.matrix * depth / (depth + device.efficiency.matrix_depth)
    if device.multiprocessors is not None:
        numbers = ALIGNED_BYTES // device.number_bytes
        if columns % numbers or depth % numbers:
            rate *= UNALIGNED if count == 1 else UNALIGNED_BATCH
        computing = 2 * depth * _area(rows, columns, count, device.multiprocessors) / rate
    else:
        computing = 2.0 * rows * columns * depth * count / rate
    moving = device.traffic_seconds(
        count * device.number_bytes * (rows * depth + depth * columns + rows * columns)
    )
    # A processor packs its operands first (Goto and van de Geijn 2008); a GPU loads them while it multiplies.
    return computing + moving if device.multiprocessors is None else max(computing, moving)


def _area(rows: int, columns: int, count: int, multiprocessors: int) -> float:
    """Return the elements of the result that the best tile makes the device compute, at the best tile's
    rate."""
    best = math.inf
    for height, width, share in TILES:
        tiles = -(-rows // height) * -(-columns // width) * count
        waves = -(-tiles // multiprocessors)
        best = min(best, waves * multiprocessors * height * width / share)
    return best


def layer_product_seconds(
    device: Device, rows: int, columns: int, depth: int, trained: float = 1.0, *, passes_on: bool = True
) -> tuple[float, float]:
    """Return the time of a linear layer's forward pass over `rows` tokens, and of its backward pass, which
    has two products: the gradients of the input and of the weight.

    trained: share of the weight that trains.
    passes_on: whether something before the layer trains, which needs the gradients of the input.
    """
    forward = product_seconds(device, rows, columns, depth)
    of_input = product_seconds(device, rows, depth, columns) if passes_on else 0.0
    of_weight = product_seconds(device, depth, columns, rows) / device.weight_gradient
    return forward, of_input + trained * of_weight
