"""The result of a rehearsal. Free of torch."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import NamedTuple

from llmtrain.parallel.layout import Coordinates, Layout
from llmtrain.plan.times.collectives import Along, Group

BETWEEN = "two ranks"
"""Group of sends and receives."""


class Collective(NamedTuple):
    """A kind of collective over the ranks of a group."""

    kind: str
    group: str
    """Axes of the layout along which the group's ranks differ, such as data · sequence; or BETWEEN."""
    size: int
    """Ranks of the group."""

    def sent_bytes(self, size: float) -> float:
        """Return the bytes that a rank sends for `size` bytes of the whole tensor, in a ring."""
        passed = Group(max(1, self.size), 1).passed(size)
        match self.kind:
            case "receive":
                return 0.0
            case "all-reduce":
                return 2 * passed
            case "all-gather" | "reduce-scatter" | "all-to-all":
                return passed
        return size

    def along(self, layout: Layout) -> Along | None:
        """Return the axis for which a plan counts its bytes; None if a plan does not count them."""
        if self.kind == "send":
            return "pipeline"
        axes = self.group.split(" · ")
        if axes == ["pipeline"]:
            return "pipeline"
        if axes == ["tensor"]:
            return "tensor"
        if self.kind == "all-to-all" and axes == ["sequence"]:
            return "sequence"
        if set(axes) <= {"data", "sequence"}:
            return "weights" if self.kind == "all-gather" else "gradients"
        return None


@dataclass
class Traffic:
    """The collectives of one rank: how many of each, and the bytes of the whole tensors."""

    calls: Counter[Collective] = field(default_factory=Counter)
    sizes: Counter[Collective] = field(default_factory=Counter)

    def sent(self, layout: Layout) -> dict[Along | None, float]:
        """Return the bytes that the rank sends along each axis; None: those that a plan does not count."""
        found: dict[Along | None, float] = {}
        for collective, size in self.sizes.items():
            along = collective.along(layout)
            found[along] = found.get(along, 0.0) + collective.sent_bytes(size)
        return found


def name_of(layout: Layout, ranks: Sequence[int]) -> str:
    """Return the axes along which these ranks differ."""
    return " · ".join(_axes(layout, ranks)) or BETWEEN


def _axes(layout: Layout, ranks: Sequence[int]) -> Iterator[str]:
    places = [layout.coordinates(rank) for rank in ranks]
    for axis in Coordinates._fields:
        if len({getattr(place, axis) for place in places}) > 1:
            yield axis


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
    """The maximum during the step."""
    step: Traffic
    setup_seconds: float
    step_seconds: float
    processor_seconds: float
    """Processor time of set-up and step together, over all threads."""
