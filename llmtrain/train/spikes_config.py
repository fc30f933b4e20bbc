"""Configuration of bad steps: which steps are bad, and how the run reacts. Free of torch."""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal

from llmtrain.config import require
from llmtrain.errors import Problem

if TYPE_CHECKING:
    from llmtrain.train.config import TrainConfig

OnSpike = Literal["skip", "rollback", "stop"]


@dataclass(frozen=True)
class SpikesConfig:
    """Which steps are bad, where `train.on_spike` is given: those whose loss or gradient norm is not finite,
    or far above that of the steps before."""

    deviations: float = 8.0
    """A loss or gradient norm is a spike if it is more than this many standard deviations above its mean. A
    deviation counts
    as 1 % of the mean at least."""
    window: int = 50
    """Number of the last taken steps over which mean and deviation are computed. Until there are so many,
    only what is not finite is bad."""
    in_a_row: int = 5
    """Bad steps in a row after which on_spike=rollback goes back, and on_spike=skip stops the run."""
    rollbacks: int = 3
    """How often a run may go back; it stops where it would do so once more."""

    def problems(self) -> Iterator[Problem]:
        is_size = math.isfinite(self.deviations) and self.deviations > 0
        yield from require(is_size, "deviations", self.deviations, "more than 0")
        yield from require(2 <= self.window <= 1000, "window", self.window, "2 to 1000")
        yield from require(self.in_a_row >= 1, "in_a_row", self.in_a_row, "1 or more")
        yield from require(self.rollbacks >= 1, "rollbacks", self.rollbacks, "1 or more")


def spike_problems(config: TrainConfig) -> Iterator[Problem]:
    """Yield a problem for a way of training whose steps cannot be left out."""
    on_spike = config.train.on_spike
    if on_spike is None:
        return
    for cannot, why in (
        (
            config.objective.takes_turns,
            f"objective={config.objective.kind}, whose parts step in turns",
        ),
        (config.method == "features", "method=features, which takes no steps"),
    ):
        yield from require(not cannot, "train.on_spike", on_spike, f"null with {why}")
    is_saved = config.checkpoint.every is not None and config.checkpoint.every < config.train.steps
    remedy = "give checkpoint.every=…, or on_spike=skip"
    yield from require(
        on_spike != "rollback" or is_saved,
        "train.on_spike",
        f"rollback with checkpoint.every={config.checkpoint.every} and train.steps={config.train.steps}",
        "skip or stop where no checkpoint is saved before the last step",
        remedy,
    )
