"""What a rehearsal found, free of torch."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass, field

from llmtrain.parallel.layout import Coordinates


@dataclass
class Traffic:
    """The collectives of one rank: (kind, size of the group) → number, and bytes of the tensors given."""

    calls: Counter[tuple[str, int]] = field(default_factory=Counter)
    sizes: Counter[tuple[str, int]] = field(default_factory=Counter)


@dataclass(frozen=True)
class Rehearsal:
    """What one rank did."""

    rank: int
    coordinates: Coordinates
    micro_batches: int
    """Of the step that was made."""
    layers: int
    """Repeated layers that it holds."""
    parameters: int
    """Elements of the weights that it holds, as its forward pass sees them."""
    held_bytes: int
    """Bytes of tensors after the step."""
    peak_bytes: int
    """The most during the step."""
    step: Traffic
    setup_seconds: float
    step_seconds: float
