"""Which steps are profiled. Free of torch."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

from llmtrain.config import require
from llmtrain.errors import Problem

MOST_STEPS = 100
"""Each step adds some megabytes to a trace, which is in memory until the last step ends."""


@dataclass(frozen=True)
class ProfileConfig:
    """Traces of a few steps by torch's profiler, in RUN/profile/."""

    steps: tuple[int, ...] = ()
    """The first and the last step, as [100,105]; []: none."""
    ranks: tuple[int, ...] = (0,)
    """Ranks that write a trace."""

    def problems(self) -> Iterator[Problem]:
        steps = self.steps
        is_range = not steps or (len(steps) == 2 and 1 <= steps[0] <= steps[1])
        yield from require(is_range, "steps", list(steps), "[FIRST,LAST] from 1 on, or []")
        if steps and is_range:
            count = steps[1] - steps[0] + 1
            yield from require(count <= MOST_STEPS, "steps", f"{count} steps", f"{MOST_STEPS} steps at most")
        yield from require(bool(self.ranks), "ranks", "[]", "one rank or more")
        yield from require(min(self.ranks, default=0) >= 0, "ranks", list(self.ranks), "ranks from 0 on")


def profile_problems(config: ProfileConfig, steps: int, world_size: int | None) -> Iterator[Problem]:
    """Yield a problem for a profile that a run of so many steps on so many processes never makes. world_size:
    None where the layout fits none."""
    if not config.steps:
        return
    allowed = f"steps up to train.steps={steps}"
    yield from require(config.steps[0] <= steps, "profile.steps", list(config.steps), allowed)
    if world_size is not None:
        got, allowed = list(config.ranks), f"0 to {world_size - 1}, the ranks of this run"
        yield from require(max(config.ranks) < world_size, "profile.ranks", got, allowed)
