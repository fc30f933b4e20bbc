"""Search all legal layouts for the one that takes least time, memory or money.

A choice is dropped as soon as its memory is known not to fit; the times of the others come from the time
model of `times/`, with the pipeline's length estimated, and exactly for the best.
"""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

from llmtrain.errors import ConfigError, Problem
from llmtrain.plan.config import ClusterConfig
from llmtrain.plan.estimate import Plan
from llmtrain.plan.space import MODES, Choice, Space
from llmtrain.plan.timing import step_time_of
from llmtrain.plan.units import gib

RankBy = Literal["time", "memory", "cost"]
WIDER = 64
"""Multiple of world_size up to which a search looks for a number of processes that fits."""
NEARBY = 64
"""Distance from world_size within which it looks for a number of processes that has a layout."""


@dataclass(frozen=True)
class Candidate:
    """A choice with its figures."""

    choice: Choice
    memory_bytes: int
    """Of one process, in the stage that holds most."""
    seconds: float
    """Of a step."""
    tokens_per_second_per_device: float
    dollars: float | None
    """Price of a step; None without a price."""

    def rank(self, by: RankBy) -> tuple[float, float]:
        """Return the sort key of a choice: the measure that the search minimizes, then the seconds."""
        if by == "memory":
            return self.memory_bytes, self.seconds
        if by == "cost":
            # Without a price, devices times seconds are the cost.
            return self.seconds * self.choice.layout.world_size, self.seconds
        return self.seconds, self.memory_bytes


@dataclass(frozen=True)
class Found:
    """What a search found."""

    best: list[Candidate]
    front: list[Candidate]
    """The choices that no other beats in both time and memory, the fastest first."""
    tried: int
    fitting: int
    own: Candidate | None
    """The user's own choice."""


def search(space: Space, world_size: int, rank_by: RankBy, top: int, own: Choice | None = None) -> Found:
    """Return the best choices for `world_size` processes; for the least cost, for fewer of them too. The
    user's own choice is among those that are compared, whatever the space has.

    Raise ConfigError when no layout has that number of processes, when none fits into memory, and where the
    cluster's figures are not known.
    """
    refuse_without_figures(space.plan.cluster, space.plan.precision)
    tried, found, least = 0, [], 0
    keys = set()
    for size in _sizes(world_size, space) if rank_by == "cost" else [world_size]:
        for choice in itertools.chain(space.choices(size), [own] if own and size == world_size else []):
            if choice is own and own.key in keys:
                continue
            keys.add(choice.key)
            tried += 1
            memory = space.plan.memory_of(choice.layout, choice.recompute).total
            least = min(least or memory, memory)
            if _fits(space.plan, memory):
                found.append(candidate(space.plan, choice, memory, is_exact=False))
    if not tried:
        raise ConfigError(_no_layout(space, world_size))
    if not found:
        raise ConfigError(_too_large(space, world_size, least))
    ranked = sorted(found, key=lambda each: each.rank(rank_by))[: max(top, 10)]
    if own is not None and all(each.choice.key != own.key for each in ranked):
        ranked += [each for each in found if each.choice.key == own.key]
    exact = [_exactly(space.plan, each) for each in ranked]
    exact.sort(key=lambda each: each.rank(rank_by))
    own_found = None
    if own is not None:
        memory = space.plan.memory_of(own.layout, own.recompute).total
        own_found = candidate(space.plan, own, memory)
    front = _front([_exactly(space.plan, each) for each in _front(found)])
    return Found(exact[:top], front, tried, len(found), own_found)


def _exactly(plan: Plan, found: Candidate) -> Candidate:
    """Return a candidate with its pipeline's schedule simulated."""
    if found.choice.layout.pipeline == 1:
        return found
    return candidate(plan, found.choice, found.memory_bytes)


def candidate(plan: Plan, choice: Choice, memory: int, *, is_exact: bool = True) -> Candidate:
    """Return a choice with its figures."""
    time = step_time_of(plan, choice.layout, choice.recompute, is_exact=is_exact)
    assert time is not None
    world_size = choice.layout.world_size
    price = plan.cluster.price_per_hour
    return Candidate(
        choice,
        memory,
        time.seconds,
        plan.tokens_per_step / time.seconds / world_size,
        None if price is None else price * world_size * time.seconds / 3600,
    )


def refuse_without_figures(cluster: ClusterConfig, precision: str) -> None:
    """Raise ConfigError if the cluster's figures do not tell times."""
    if precision not in cluster.peak_flops or cluster.memory_bandwidth is None:
        known = ", ".join(cluster.peak_flops) or "none"
        got = f"{cluster.name}, whose peaks are of: {known}"
        remedy = "name cluster=h100_80g or another, or measure this machine: llmtrain plan calibrate"
        raise ConfigError(Problem("cluster", got, f"a cluster with peak_flops.{precision}", remedy))


def _sizes(world_size: int, space: Space) -> list[int]:
    """Return the numbers of processes that a search for the least cost tries: halves of world_size, as long
    as they are whole hosts."""
    host = space.host or 1
    sizes = [world_size]
    while sizes[-1] % (2 * host) == 0:
        sizes.append(sizes[-1] // 2)
    return sizes


def _fits(plan: Plan, memory: int) -> bool:
    return plan.available_bytes is None or memory <= plan.available_bytes


def _front(found: Sequence[Candidate]) -> list[Candidate]:
    front: list[Candidate] = []
    for each in sorted(found, key=lambda one: (one.seconds, one.memory_bytes)):
        if not front or each.memory_bytes < front[-1].memory_bytes:
            front.append(each)
    return front


def _no_layout(space: Space, world_size: int) -> Problem:
    """Return what is wrong with a number of processes that no layout has, with the nearest that do."""
    near = []
    for distance in range(1, NEARBY + 1):
        sizes = [size for size in (world_size - distance, world_size + distance) if size >= 1]
        near += [str(size) for size in sizes if next(space.choices(size), None) is not None]
        if near:
            break
    remedy = f"nearest: {', '.join(near)}" if near else "take another batch.global_size"
    allowed = f"processes that batch.global_size={space.batch.global_size} and the model divide into"
    return Problem("world_size", str(world_size), allowed, remedy)


def _too_large(space: Space, world_size: int, least: int) -> Problem:
    """Return that nothing fits, with what would: more processes, or a larger device."""
    plan = space.plan
    assert plan.available_bytes is not None
    remedy = f"take devices with {gib(least)} or more, a shorter batch.sequence_length, or a smaller model"
    factor = WIDER + 1 if plan.cluster.is_local else 2  # this machine has no more processes' memory
    while factor <= WIDER:
        if _any_fits(space, factor * world_size):
            remedy = f"take {factor * world_size} processes, with which a layout fits"
            break
        factor *= 2
    return Problem(
        "memory",
        f"{gib(least)} a process in the layout that needs least",
        f"{gib(plan.available_bytes)}, what one process has on {plan.cluster.name}",
        remedy,
    )


def _any_fits(space: Space, world_size: int) -> bool:
    return any(
        _fits(space.plan, space.plan.memory_of(choice.layout, choice.recompute).total)
        for choice in space.choices(world_size)
        if choice.batch.micro_size == 1
        and choice.recompute.mode == (MODES[-1] if space.recomputes else MODES[0])
    )
