"""Constants of the time model, from operations of torch: products of several depths, norms, additions and
activations of a layer, attention, and the smallest addition.

`python -m llmtrain.preflight.constants DEVICE SECONDS BANDWIDTH MULTIPROCESSORS` is one of several processes
that measure at once: it says that it is ready, waits for a line, and prints what it measured.
"""

from __future__ import annotations

import json
import os
import sys
import time
from collections.abc import Callable, Mapping
from statistics import median
from typing import NamedTuple

import torch
import torch.nn.functional as F

from llmtrain.distributed import processes
from llmtrain.plan.config import EfficiencyConfig
from llmtrain.plan.times.attention import Call, attention_seconds
from llmtrain.plan.times.device import Device
from llmtrain.preflight.cluster_file import PRODUCTS
from llmtrain.preflight.measure import (
    median_seconds,
    precisions,
    shaped_product_flops,
    weight_gradient_flops,
)

PRODUCT_ROWS = {"cpu": 1024, "cuda": 8192}
DEPTHS = (64, 256, 1024)
"""Inner dimensions of the products that are measured."""
TOKENS, WIDTH = {"cpu": 1024, "cuda": 16384}, 1024
"""Tokens and hidden_size of the layer whose operations on each element are measured."""
ROWS, HEADS, HEAD_WIDTH = 4, 8, 64
QUERIES = {"cpu": 512, "cuda": 4096}
STARTS = 1000
"""Operations on one number that are started to time a start."""
READY = "ready"


class Measured(NamedTuple):
    """What one process found."""

    constants: dict[str, float]
    """Keys of a cluster's `efficiency`, dotted where one holds several by precision."""
    peaks: dict[str, float]
    """FLOP/s, by the names of a check's figures."""


@torch.no_grad()
def measure_constants(
    device: torch.device, seconds: float, bandwidth: float, multiprocessors: int | None
) -> Measured:
    """Measure in this process. bandwidth: of the memory, bytes a second."""
    constants, peaks = _product_constants(device, seconds)
    by_precision = {key.removesuffix(PRODUCTS): peak for key, peak in peaks.items()}
    return Measured(
        {**constants, **_layer_constants(by_precision, bandwidth, multiprocessors, device, seconds)}, peaks
    )


def _product_constants(device: torch.device, seconds: float) -> tuple[dict[str, float], dict[str, float]]:
    """Return the constants of the depth and of weights' gradients, and the peaks by name of their figures.

    The time model's rate of a product of depth k is P k / (k + d): so 1 / rate is linear in 1 / k, and the
    line through the measured points gives P and d.
    """
    rows = PRODUCT_ROWS[device.type]
    peaks, constants = {}, {}
    for precision in precisions(device):
        points = [
            (1 / depth, 1 / shaped_product_flops(device, precision, (rows, depth, rows), seconds / 2))
            for depth in DEPTHS
        ]
        # Least squares of relative errors: each point weighs as its rate squared.
        weights = [1 / y**2 for _, y in points]
        total = sum(weights)
        x_mean = sum(w * x for w, (x, _) in zip(weights, points, strict=True)) / total
        y_mean = sum(w * y for w, (_, y) in zip(weights, points, strict=True)) / total
        spread = sum(w * (x - x_mean) ** 2 for w, (x, _) in zip(weights, points, strict=True))
        slope = (
            sum(w * (x - x_mean) * (y - y_mean) for w, (x, y) in zip(weights, points, strict=True)) / spread
        )
        inverse = y_mean - slope * x_mean
        if slope <= 0 or inverse <= 0:  # the shallow products are as fast
            slope, inverse = 0.0, min(y for _, y in points)
        peaks[f"{precision} products"] = 1 / inverse
        constants[f"matrix_depths.{precision}"] = slope / inverse
        plain, transposed = (
            flops(device, precision, (rows // 2, 2 * rows, rows), seconds / 2)  # few outputs of many tokens
            for flops in (shaped_product_flops, weight_gradient_flops)
        )
        constants[f"weight_gradients.{precision}"] = min(1.0, transposed / plain)
    depths = [depth for name, depth in constants.items() if name.startswith("matrix_depths.")]
    return {**constants, "matrix_depth": sum(depths) / len(depths)}, peaks


def _layer_constants(
    peaks: Mapping[str, float],
    bandwidth: float,
    multiprocessors: int | None,
    device: torch.device,
    seconds: float,
) -> dict[str, float]:
    """Return the constants of operations on each element, of attention and of starts."""
    tokens, found = TOKENS[device.type], {}
    x_TD = torch.randn(tokens, WIDTH, device=device)
    x_TF = torch.randn(tokens, 4 * WIDTH, device=device)
    weight_D = torch.ones(WIDTH, device=device)

    def elements() -> object:
        normed = F.layer_norm(x_TD, (WIDTH,), weight_D, weight_D)
        return normed, x_TD + normed, F.gelu(x_TF, approximate="tanh")

    # What the time model counts of a norm, an addition and an activation in fp32: read and written once.
    size = tokens * WIDTH * (2 * 4 + 3 * 4 + 4 * 2 * 4)
    found["unfused"] = max(1.0, median_seconds(elements, device, seconds) * bandwidth / size)
    found["attention"] = _attention_share(peaks, bandwidth, multiprocessors, device, seconds)
    found["kernel_seconds"] = _start_seconds(device)
    return found


def _attention_share(
    peaks: Mapping[str, float],
    bandwidth: float,
    multiprocessors: int | None,
    device: torch.device,
    seconds: float,
) -> float:
    precision = "bf16" if device.type == "cuda" else "fp32"
    queries = QUERIES[device.type]
    dtype = torch.bfloat16 if device.type == "cuda" else torch.float32
    q, k, v = torch.randn(3, ROWS, HEADS, queries, HEAD_WIDTH, device=device, dtype=dtype).unbind()
    a_call = median_seconds(lambda: F.scaled_dot_product_attention(q, k, v, is_causal=True), device, seconds)
    ideal = Device(
        peaks[precision],
        bandwidth,
        multiprocessors,
        dtype.itemsize,
        EfficiencyConfig(matrix=1.0, attention=1.0, memory=1.0),
    )
    call = Call(ROWS, queries, (queries + 1) / 2, HEADS, HEAD_WIDTH, dropout=False, kernel="flash")
    return min(1.5, attention_seconds(ideal, call)[0] / a_call)


def _start_seconds(device: torch.device) -> float:
    """Return the time in which the host starts one operation of the device, without waiting for its end."""
    number = torch.zeros(1, device=device)

    def starts(work: Callable[[], object]) -> float:
        started = time.perf_counter()
        for _ in range(STARTS):
            work()
        return (time.perf_counter() - started) / STARTS

    return median(starts(lambda: number.add_(1.0)) for _ in range(5))


def _main(kind: str, seconds: str, bandwidth: str, multiprocessors: str) -> None:
    device = processes.pick_device(kind)
    if device.type == "cuda":
        device = torch.device("cuda", int(os.environ["LOCAL_RANK"]))
        torch.cuda.set_device(device)
    print(READY, flush=True)
    if sys.stdin.readline():
        found = measure_constants(device, float(seconds), float(bandwidth), int(multiprocessors) or None)
        print(json.dumps(found._asdict()))


if __name__ == "__main__":
    _main(*sys.argv[1:])
