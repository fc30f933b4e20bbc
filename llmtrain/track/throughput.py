"""How fast a run is: tokens per second, share of the device's arithmetic, memory."""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Callable
from functools import cache
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from torch import Tensor

Product = Callable[["Tensor", "Tensor"], "Tensor"]

PEAK_TFLOPS: tuple[tuple[str, float, float | None, float], ...] = (
    # device, fp16, bf16, fp32
    ("GB200", 2500, 2500, 1250),
    ("B200", 2250, 2250, 1125),
    ("H200", 989, 989, 494),
    ("H100 PCIe", 756, 756, 378),
    ("H100 NVL", 835, 835, 417),
    ("H100", 989, 989, 494),
    ("A100", 312, 312, 156),
    ("A40", 149.7, 149.7, 74.8),
    ("A10G", 70, 70, 35),
    ("A10", 125, 125, 62.5),
    ("L40S", 362, 362, 183),
    ("L4", 121, 121, 60),
    ("RTX 4090", 165, 165, 82.6),
    ("RTX 3090", 71, 71, 35.6),
    ("V100", 125, None, 15.7),
    ("T4", 65, None, 8.1),
    ("MI300X", 1307, 1307, 653),
    ("MI250X", 191, 191, 47.9),
)
"""Dense matrix TFLOP/s by the vendors' data sheets: fp32 as TF32 where the device has it, one die of an
MI250X, None where the type is not built in. The first name found in the device's name counts."""


class ThroughputMeter:
    """Tokens per second over the last `window` steps.

    The first step of a process allocates and compiles: it counts only until a second one is done.
    """

    def __init__(self, window: int = 20) -> None:
        self._steps: deque[tuple[int, float]] = deque(maxlen=window)
        self._is_warm = False

    def add(self, tokens: int, seconds: float) -> None:
        """Count a step that trained on `tokens`, over all replicas, and took `seconds`."""
        if self._steps and not self._is_warm:
            self._steps.clear()
            self._is_warm = True
        self._steps.append((tokens, seconds))

    @property
    def tokens_per_second(self) -> float:
        """0 before the first step has ended."""
        seconds = sum(s for _, s in self._steps)
        return sum(t for t, _ in self._steps) / seconds if seconds > 0 else 0.0


def model_flops_utilization(tokens_per_second: float, flops_per_token: float, peak_flops: float) -> float:
    """MFU (PaLM, arXiv:2204.02311): the share of `peak_flops` (over all devices of the run) that the
    model's own FLOPs take; recomputation does not count as work."""
    return tokens_per_second * flops_per_token / peak_flops if peak_flops > 0 else 0.0


def listed_peak_flops(device_name: str, precision: str) -> float | None:
    """Peak FLOPs per second of a known GPU in "fp32", "bf16" or "fp16"; None when it is not listed."""
    for name, fp16, bf16, fp32 in PEAK_TFLOPS:
        if name.lower() in device_name.lower():
            peak = {"fp16": fp16, "bf16": bf16, "fp32": fp32}[precision]
            return None if peak is None else peak * 1e12
    return None


@cache
def peak_flops(device_type: str, precision: str, product: Product | None = None) -> float:
    """Peak FLOPs per second of this process' device: listed, or else measured once by a matrix product
    (under 0.3 s), which is the ceiling that this machine really has. product: the models'; None: torch's."""
    if device_type == "cuda":
        import torch

        listed = listed_peak_flops(torch.cuda.get_device_name(), precision)
        if listed is not None:
            return listed
    return _measure_flops(device_type, precision, product)


def _measure_flops(
    device_type: str, precision: str, product: Product | None, size: int = 1024, seconds: float = 0.1
) -> float:
    import torch

    product = product or torch.mm

    dtype = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}[precision]
    a, b = (torch.ones(size, size, dtype=dtype, device=device_type) for _ in range(2))
    best = float("inf")
    deadline = time.perf_counter() + seconds
    with torch.no_grad():
        while True:
            started = time.perf_counter()
            product(a, b)
            if device_type == "cuda":
                torch.cuda.synchronize()
            now = time.perf_counter()
            best = min(best, now - started)
            if now > deadline:
                return 2.0 * size**3 / best


def memory_bytes(device_type: str) -> int:
    """Most bytes allocated so far on a cuda device; resident bytes of this process elsewhere."""
    if device_type == "cuda":
        import torch

        return torch.cuda.max_memory_allocated()
    import psutil

    return psutil.Process().memory_info().rss
