"""Which of two values of a figure is the better one."""

from __future__ import annotations

LOSS_OF = "loss/"
"""Beginning of the name of the loss of one corpus of a mixture."""
_GO_DOWN = ("loss", "error", "perplexity", "bits_per_byte")
"""Ends of the names of figures of which less is better."""


def goes_down(metric: str) -> bool:
    """Return whether less is better, as of losses and errors; of other figures more is."""
    return metric.endswith(_GO_DOWN) or metric.startswith(LOSS_OF)


def gain(metric: str, value: float, before: float) -> float:
    """Return by how much `value` is better than `before`; negative where it is worse."""
    return before - value if goes_down(metric) else value - before
