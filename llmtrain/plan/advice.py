"""The one change of a run's settings that would help most, and how one choice compares with another."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace

from llmtrain.nn.recompute_config import RecomputeConfig
from llmtrain.plan.search import Candidate, RankBy, candidate
from llmtrain.plan.space import MODES, Choice, Space
from llmtrain.plan.times.text import milliseconds
from llmtrain.plan.timing import step_time_of

WORTH_TELLING = 0.01
"""Smallest share of a step that a suggested change must save."""


def best_change(space: Space, own: Choice) -> str | None:
    """Return the change that saves the most time of a step and fits into memory; None if none saves a
    percent."""
    plan, world_size = space.plan, own.layout.world_size
    now = candidate(plan, own, 0, is_exact=False).seconds
    best, least = None, now * (1 - WORTH_TELLING)
    for choice in _neighbours(space, own, world_size):
        seconds = candidate(plan, choice, 0, is_exact=False).seconds
        if seconds < least:
            memory = plan.memory_of(choice.layout, choice.recompute).total
            if plan.available_bytes is None or memory <= plan.available_bytes:
                best, least = choice, seconds
    if best is None:
        return None
    return f"{' '.join(_differences(own, best))}, which takes {1 - least / now:.0%} less"


def compared(space: Space, own: Candidate, best: Candidate, rank_by: RankBy, whose: str) -> str:
    """Return how the user's own choice compares with the best one by the measure of the search, and why.
    whose: what the message calls that choice."""
    if own.choice.key == best.choice.key:
        return f"{whose} is the first"
    mine, least = own.rank(rank_by)[0], best.rank(rank_by)[0]
    share, of_time = mine / least - 1, own.seconds / best.seconds - 1
    if rank_by == "memory":
        text = (
            "takes as much memory as the first" if share < WORTH_TELLING else f"takes {share:.0%} more memory"
        )
        than = " than the first" if share >= WORTH_TELLING else ""
        return f"{whose} {text}{than}, and {_time_text(of_time)}"
    if rank_by == "cost":
        if share < WORTH_TELLING:
            return f"{whose} costs as much as the first, and {_time_text(of_time)}"
        return f"{whose} costs {share:.0%} more than the first, and {_time_text(of_time)}"
    if share < WORTH_TELLING:
        return f"{whose} is as fast as the first"
    return f"{whose} takes {share:.0%} longer than the first: {_parts_text(space, own, best)}"


def _time_text(share: float) -> str:
    """Return a difference in time from the first choice in words."""
    if abs(share) < WORTH_TELLING:
        return "is as fast"
    return f"takes {share:.0%} longer" if share > 0 else f"takes {-share:.0%} less time"


def _parts_text(space: Space, own: Candidate, best: Candidate) -> str:
    """Return the parts of a step that take longer than in the best choice."""
    times = [step_time_of(space.plan, each.choice.layout, each.choice.recompute) for each in (own, best)]
    mine, other = times
    assert mine is not None
    assert other is not None
    more = {name: seconds - other.parts.get(name, 0.0) for name, seconds in mine.parts.items()}
    parts = sorted(more, key=more.__getitem__, reverse=True)[:3]
    named = [f"{name} +{milliseconds(more[name])}" for name in parts if more[name] > 0.005 * own.seconds]
    return ", ".join(named) or "little of each part"


def _neighbours(space: Space, own: Choice, world_size: int) -> Iterator[Choice]:
    """Yield choices with one setting changed."""
    parallel, batch = own.parallel, own.batch
    for mode in MODES:
        if mode != own.recompute.mode:
            yield replace(own, recompute=RecomputeConfig(mode))  # type: ignore[arg-type]
    parallels = []
    for axis in ("tensor", "pipeline", "sequence"):
        size = getattr(parallel, axis)
        parallels += [
            replace(parallel, data=None, **{axis: new})
            for new in (2 * size, size // 2)
            if new >= 1 and (axis == "pipeline" or space.host is None or new <= space.host)
        ]
    parallels += [replace(parallel, zero=zero) for zero in (0, 1, 2, 3) if zero != parallel.zero]  # type: ignore[arg-type]
    parallels.append(replace(parallel, tensor_sequence=not parallel.tensor_sequence))
    parallels.append(replace(parallel, balance="time"))
    if parallel.offload_optimizer != "none":
        parallels.append(replace(parallel, offload_optimizer="none"))
    changed = [(each, batch) for each in parallels]
    changed += [
        (parallel, replace(batch, micro_size=size))
        for size in (2 * batch.micro_size, batch.micro_size // 2)
        if size >= 1
    ]
    for to, of_size in changed:
        if layout := space.layout(to, of_size, world_size):
            yield Choice(to, of_size, own.recompute, layout)


def _differences(own: Choice, other: Choice) -> Iterator[str]:
    for name in own.parallel.__dataclass_fields__:
        value = getattr(other.parallel, name)
        if name != "data" and value != getattr(own.parallel, name):
            yield f"parallel.{name}={str(value).lower() if isinstance(value, bool) else value}"
    if other.batch.micro_size != own.batch.micro_size:
        yield f"batch.micro_size={other.batch.micro_size}"
    if other.recompute != own.recompute:
        yield f"recompute={other.recompute.mode}"
