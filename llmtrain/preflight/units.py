"""Sizes and speeds as text."""

from __future__ import annotations

from typing import Literal

Unit = Literal["FLOP", "B"]
PREFIXES = ((1e15, "P"), (1e12, "T"), (1e9, "G"), (1e6, "M"), (1e3, "k"))


def speed_text(value: float, unit: Unit) -> str:
    """Return a speed with three digits: 312 TFLOP/s, 9.81 GB/s."""
    scale, prefix = next(((s, p) for s, p in PREFIXES if value >= 0.9995 * s), (1.0, ""))
    return f"{value / scale:#.3g}".rstrip(".") + f" {prefix}{unit}/s"


def size_text(value: float) -> str:
    """Return bytes as GiB, or as MiB below one."""
    return f"{value / 2**30:,.1f} GiB" if value >= 2**30 else f"{value / 2**20:,.0f} MiB"
