"""Sizes, counts and durations as a reader wants them."""

from __future__ import annotations

from llmtrain.plan.memory import GIB


def gib(size: float) -> str:
    """Return a size such as 1.23 GiB, in MiB below a tenth of a GiB."""
    return f"{size / GIB:,.2f} GiB" if abs(size) >= GIB / 10 else f"{size / 2**20:,.1f} MiB"


def quantity(number: float, unit: str) -> str:
    """Return a number with its unit and an SI prefix, such as 12.3 MFLOP."""
    for letter, size in (
        ("Z", 1e21),
        ("E", 1e18),
        ("P", 1e15),
        ("T", 1e12),
        ("G", 1e9),
        ("M", 1e6),
        ("k", 1e3),
    ):
        if number >= size:
            return f"{number / size:.4g} {letter}{unit}"
    return f"{number:.4g} {unit}"


def billions(number: float) -> str:
    """Return a number in billions, or in millions below one billion."""
    return f"{number / 1e9:,.3g} billion" if number >= 1e9 else f"{number / 1e6:,.3g} million"


def duration(seconds: float) -> str:
    """Return a duration rounded to three digits, in the largest unit of which it has two."""
    for name, size in (("days", 86400), ("hours", 3600), ("minutes", 60)):
        if seconds >= 2 * size:
            return f"{seconds / size:.3g} {name}"
    return f"{seconds:.3g} seconds"


def digits(number: float, count: int) -> str:
    """Return a number with so many digits, or all before the point, such as 97.123 or 108,650."""
    return f"{number:,.0f}" if number >= 10**count else f"{number:,.{count}g}"
