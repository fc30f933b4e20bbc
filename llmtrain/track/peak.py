"""What a device can do at most, which MFU is a share of: a GPU by its vendor's data sheet, a CPU by the best
that was ever measured on it, since a busy machine gives less than it can."""

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
"""Dense matrix TFLOP/s by the vendors' data sheets: fp32 as TF32 where the device has it, one die of an
MI250X, None where the type is not built in. The first name found in the device's name counts."""

MEASURING_SECONDS = 0.25
"""For products of matrices, the fastest of which counts."""
MEASURED_AGAIN = 3
"""How often a run that does more than was ever measured has it measured anew."""


@dataclass(frozen=True)
class Peak:
    """FLOPs per second of one device in one type of number."""

    flops: float
    source: str
    """Where the figure is from, in words."""


class PeakKeeper:
    """The peak of this process' device; None where it is not known.

    What is measured is kept in a file of the machine, and only ever rises."""

    def __init__(self, device_type: str, precision: str, product: Product | None = None) -> None:
        """product: the models' own, (M, I) · (O, I) → (M, O); tried beside torch's."""
        self.peak: Peak | None = None
        self._measure: Callable[[], float] | None = None
        self._again = MEASURED_AGAIN
        if device_type == "cuda":
            import torch

            self.peak = listed_peak(torch.cuda.get_device_name(), precision)
        elif device_type == "cpu":
            self._key = _key(precision)
            self._measure = lambda: _measured_flops(precision, product)
            self._raise()

    def utilization(self, flops_per_second: float) -> float | None:
        """The share of the peak that `flops_per_second` of one device are, at most 1. None where no peak is
        known, or where the run does more: then the device is another than it says, or the model does less
        than is counted, as attention does that leaves out other documents."""
        if self.peak is None:
            return None
        if flops_per_second > self.peak.flops and self._measure is not None and self._again:
            self._again -= 1
            self._raise()
        return flops_per_second / self.peak.flops if flops_per_second <= self.peak.flops else None

    def _raise(self) -> None:
        """Measure once more; the best ever counts."""
        assert self._measure is not None
        kept, measured = _kept(), self._measure()
        best = max(measured, kept.get(self._key, 0.0))
        self.peak = Peak(best, "the best measured on this machine")
        if best > kept.get(self._key, 0.0):
            try:
                kept_file().parent.mkdir(parents=True, exist_ok=True)
                files.write_json_atomically(kept_file(), {**kept, self._key: best})
            except OSError:  # then it holds for this run alone
                pass


def listed_peak(device_name: str, precision: str) -> Peak | None:
    """Of a known GPU in "fp32", "bf16" or "fp16"; None when it is not listed."""
    for name, fp16, bf16, fp32 in PEAK_TFLOPS:
        if name.lower() in device_name.lower():
            tflops = {"fp16": fp16, "bf16": bf16, "fp32": fp32}[precision]
            return None if tflops is None else Peak(tflops * 1e12, f"the data sheet of {name}")
    return None


def kept_file() -> Path:
    """FLOPs per second by processor, threads and type; those of several machines that share a home."""
    cache = os.environ.get("XDG_CACHE_HOME") or "~/.cache"
    return Path(cache).expanduser() / "llmtrain" / "peak_flops.json"


def _kept() -> dict[str, float]:
    try:
        kept = json.loads(kept_file().read_text())
        return {str(key): float(value) for key, value in kept.items()}
    except (OSError, ValueError, TypeError, AttributeError):  # none, or one that is damaged
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
    # Hosts of a cloud name processors of several generations alike.
    widest = next((name for name in ("amx_tile", "avx512f", "avx2", "sve", "asimd") if name in flags), "")
    return " ".join(filter(None, (names[0] if names else platform.processor(), platform.machine(), widest)))


def _measured_flops(precision: str, product: Product | None) -> float:
    import torch

    dtype = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}[precision]
    fastest = 0.0
    deadline = time.perf_counter() + MEASURING_SECONDS
    with torch.no_grad():
        # From small ones on: a product of a type that the processor lacks may take seconds.
        for size in itertools.chain((256, 512), itertools.repeat(1024)):
            a, b = (torch.ones(size, size, dtype=dtype) for _ in range(2))
            for multiply in (torch.mm, product or torch.mm):
                started = time.perf_counter()
                multiply(a, b)
                fastest = max(fastest, 2.0 * size**3 / (time.perf_counter() - started))
            if time.perf_counter() > deadline:
                break
    return fastest
