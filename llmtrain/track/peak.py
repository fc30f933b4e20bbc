"""Peak FLOP/s of a device, the denominator of MFU (model FLOPs utilization).

For a GPU from the vendor's data sheet, for a CPU the best value ever measured on this machine, since a busy
machine reaches less.
"""

from __future__ import annotations

import itertools
import json
import os
import platform
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from llmtrain import files

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
"""Dense matrix TFLOP/s from the vendors' data sheets: fp32 as TF32 where the device supports it, one die of
an MI250X, None for unsupported types. The first name contained in the device name applies."""

MEASURING_SECONDS = 0.25
"""Time spent on matrix products, the fastest of which counts."""
MAX_REMEASUREMENTS = 3
"""How often a run that exceeds the best measurement repeats it."""


@dataclass(frozen=True)
class Peak:
    """Peak of one device for one precision."""

    flops: float
    """FLOP/s."""
    source: str
    """Origin of the figure, for messages."""


class PeakKeeper:
    """Keeps the peak of this process' device; `peak` is None if it is unknown.

    The best measurement is stored in a file of the machine and only increases.
    """

    def __init__(self, device_type: str, precision: str, product: Product | None = None) -> None:
        """product: matrix product of the models, (M, I) · (O, I) → (M, O), measured in addition to
        torch.mm."""
        self.peak: Peak | None = None
        self._measure: Callable[[], float] | None = None
        self._remeasurements_left = MAX_REMEASUREMENTS
        if device_type == "cuda":
            import torch

            self.peak = listed_peak(torch.cuda.get_device_name(), precision)
        elif device_type == "cpu":
            self._key = _key(precision)
            self._measure = lambda: _measured_flops(precision, product)
            self._update()

    def utilization(self, flops_per_second: float) -> float | None:
        """Return `flops_per_second` of one device as a share of the peak, at most 1.

        Return None if the peak is unknown or exceeded: then the device is not what its name says, or the
        model does less work than is counted, as attention does that skips other documents.
        """
        if self.peak is None:
            return None
        if flops_per_second > self.peak.flops and self._measure is not None and self._remeasurements_left:
            self._remeasurements_left -= 1
            self._update()
        return flops_per_second / self.peak.flops if flops_per_second <= self.peak.flops else None

    def _update(self) -> None:
        """Measure, and keep the best value of all measurements."""
        assert self._measure is not None
        kept, measured = _kept(), self._measure()
        best = max(measured, kept.get(self._key, 0.0))
        self.peak = Peak(best, "the best measured on this machine")
        if best > kept.get(self._key, 0.0):
            try:
                kept_file().parent.mkdir(parents=True, exist_ok=True)
                files.write_json_atomically(kept_file(), {**kept, self._key: best})
            except OSError:  # the value then applies to this run only
                pass


def listed_peak(device_name: str, precision: str) -> Peak | None:
    """Return the peak of a GPU for "fp32", "bf16" or "fp16"; None if it is not listed."""
    for name, fp16, bf16, fp32 in PEAK_TFLOPS:
        if name.lower() in device_name.lower():
            tflops = {"fp16": fp16, "bf16": bf16, "fp32": fp32}[precision]
            return None if tflops is None else Peak(tflops * 1e12, f"the data sheet of {name}")
    return None


def kept_file() -> Path:
    """Return the path of the file of measurements: FLOP/s by processor, threads and precision, as machines
    may share a home folder."""
    cache = os.environ.get("XDG_CACHE_HOME") or "~/.cache"
    return Path(cache).expanduser() / "llmtrain" / "peak_flops.json"


def _kept() -> dict[str, float]:
    try:
        kept = json.loads(kept_file().read_text())
        return {str(key): float(value) for key, value in kept.items()}
    except (OSError, ValueError, TypeError, AttributeError):  # missing or damaged
        return {}


def _key(precision: str) -> str:
    import torch

    return f"{_processor()}, {torch.get_num_threads()} threads, {precision}"


def _processor() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
        names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
        flags = next((line for line in lines if line.startswith(("flags", "Features"))), "")
    except OSError:
        names, flags = [], ""
    # Cloud hosts report the same name for processors of several generations.
    widest = next((name for name in ("amx_tile", "avx512f", "avx2", "sve", "asimd") if name in flags), "")
    return " ".join(filter(None, (names[0] if names else platform.processor(), platform.machine(), widest)))


def _measured_flops(precision: str, product: Product | None) -> float:
    import torch

    dtype = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}[precision]
    fastest = 0.0
    deadline = time.perf_counter() + MEASURING_SECONDS
    with torch.no_grad():
        # Start with small matrices: a product in an unsupported type may take seconds.
        for size in itertools.chain((256, 512), itertools.repeat(1024)):
            a, b = (torch.ones(size, size, dtype=dtype) for _ in range(2))
            for multiply in (torch.mm, product or torch.mm):
                started = time.perf_counter()
                multiply(a, b)
                fastest = max(fastest, 2.0 * size**3 / (time.perf_counter() - started))
            if time.perf_counter() > deadline:
                break
    return fastest
