"""How fast this rank's device multiplies matrices and moves memory."""

from __future__ import annotations

import math
import time
from collections.abc import Callable
from statistics import median

import torch

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}
CHUNK_SECONDS = 0.01
"""Calls are timed in chunks of about this time, as waiting for a GPU takes some microseconds itself."""
FIRST_SIZE = 256
"""Matrices to begin with: a product in a type that the processor lacks may take seconds."""
PRODUCT_SIZE = {"cpu": 1024, "cuda": 8192}
COPY_BYTES = {"cpu": 256 << 20, "cuda": 1 << 30}
"""More than the caches hold."""


def synchronize(device: torch.device) -> None:
    """Wait until the device has done what it was given."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def median_seconds(work: Callable[[], object], device: torch.device, seconds: float) -> float:
    """Return the median time of `work()`, repeated for about `seconds`, at least once.

    The median, not the best: a rank that another program slows down has a good moment now and then."""
    work()
    synchronize(device)
    started = time.perf_counter()
    work()
    synchronize(device)
    calls = max(1, math.ceil(CHUNK_SECONDS / max(1e-9, time.perf_counter() - started)))
    deadline = time.perf_counter() + seconds
    times: list[float] = []
    while not times or time.perf_counter() < deadline:
        started = time.perf_counter()
        for _ in range(calls):
            work()
        synchronize(device)
        times.append((time.perf_counter() - started) / calls)
    return median(times)


def product_flops(device: torch.device, precision: str, seconds: float, size: int | None = None) -> float:
    """Return the FLOP/s of products of two square matrices of `size` rows; None: what suits the device."""
    wanted = size or PRODUCT_SIZE[device.type]
    first = min(FIRST_SIZE, wanted)
    a_product = median_seconds(_product(device, precision, first, first, first), device, 0.0)
    if a_product * (wanted / first) ** 3 > 4 * max(seconds, 0.25):
        wanted = first
    return (
        2.0 * wanted**3 / median_seconds(_product(device, precision, wanted, wanted, wanted), device, seconds)
    )


def _product(device: torch.device, precision: str, m: int, k: int, n: int) -> Callable[[], object]:
    # Random numbers: a GPU multiplies zeros with less power, and so at a higher clock.
    made = torch.Generator(device).manual_seed(0)
    a_MK = torch.randn(m, k, generator=made, device=device).to(DTYPES[precision])
    b_KN = torch.randn(k, n, generator=made, device=device).to(DTYPES[precision])
    out_MN = torch.empty(m, n, device=device, dtype=DTYPES[precision])
    return lambda: torch.mm(a_MK, b_KN, out=out_MN)


def shaped_product_flops(
    device: torch.device, precision: str, shape: tuple[int, int, int], seconds: float
) -> float:
    """Return the FLOP/s of products (m, k) · (k, n) for shape = (m, k, n)."""
    m, k, n = shape
    return 2.0 * m * k * n / median_seconds(_product(device, precision, m, k, n), device, seconds)


def weight_gradient_flops(
    device: torch.device, precision: str, shape: tuple[int, int, int], seconds: float
) -> float:
    """Return the FLOP/s of such products where both operands are read across their rows, as for the gradient
    of a weight: the first is a transposed view."""
    m, k, n = shape
    made = torch.Generator(device).manual_seed(0)
    a_KM = torch.randn(k, m, generator=made, device=device).to(DTYPES[precision])
    b_KN = torch.randn(k, n, generator=made, device=device).to(DTYPES[precision])
    return 2.0 * m * k * n / median_seconds(lambda: a_KM.t() @ b_KN, device, seconds)


def copy_bytes_per_second(device: torch.device, seconds: float, size: int | None = None) -> float:
    """Return the bytes a second that a copy within the device's memory reads and writes.

    size: bytes that are copied; None: more than the caches hold."""
    source = torch.ones((size or COPY_BYTES[device.type]) // 4, device=device)
    target = torch.empty_like(source)
    a_copy = median_seconds(lambda: target.copy_(source), device, seconds)
    return 2 * source.nbytes / a_copy


def upload_bytes_per_second(device: torch.device, seconds: float) -> float:
    """Return the bytes a second that a copy from pinned memory of the host to the GPU moves."""
    source = torch.ones(COPY_BYTES["cpu"] // 4, pin_memory=True)
    target = torch.empty_like(source, device=device)
    return source.nbytes / median_seconds(lambda: target.copy_(source, non_blocking=True), device, seconds)


def precisions(device: torch.device) -> tuple[str, ...]:
    """Return the types that products are measured in."""
    return ("fp32", "bf16", "fp16") if device.type == "cuda" else ("fp32", "bf16")


def measure(device: torch.device, seconds: float, before: Callable[[], None]) -> dict[str, float]:
    """Return the figures of this rank by name, each measured for `seconds`.

    before: called before each, so that all ranks begin together."""
    found = {}
    with torch.no_grad():
        for precision in precisions(device):
            before()
            found[f"{precision} products"] = product_flops(device, precision, seconds)
        before()
        found["memory"] = copy_bytes_per_second(device, seconds)
        if device.type == "cuda":
            before()
            found["upload"] = upload_bytes_per_second(device, seconds)
    return found
