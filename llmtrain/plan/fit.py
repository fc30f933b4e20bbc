"""Whether a run fits into memory, and the smallest change of its settings with which it would."""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from dataclasses import replace
from typing import Any

from llmtrain.errors import ConfigError, Problem
from llmtrain.models.registry import family_of
from llmtrain.nn.recompute_config import RecomputeConfig
from llmtrain.parallel.layout import Layout
from llmtrain.plan.estimate import Plan
from llmtrain.plan.units import gib


def refuse_if_too_large(plan: Plan) -> None:
    """Raise ConfigError when the run cannot fit; its message names settings that would fit."""
    if plan.is_refused:
        raise ConfigError(_problem(plan))


def warnings(plan: Plan) -> list[str]:
    """Return what a user should know before the run starts, short of a refusal; empty when all is well."""
    return [str(_problem(plan))] if plan.is_too_large and not plan.is_refused else []


def _problem(plan: Plan) -> Problem:
    assert plan.available_bytes is not None
    term = plan.memory.largest
    machine = "this machine" if plan.cluster.is_local else plan.cluster.name
    return Problem(
        "memory",
        f"{gib(plan.memory.total)} a process, {gib(plan.memory.terms[term])} of it {term}",
        f"{gib(plan.available_bytes)}, what one process has on {machine}",
        _remedy(plan),
    )


def _remedy(plan: Plan) -> str:
    """Return the smallest change with which the run fits: of ZeRO and the micro-batch, then of recomputation,
    then of tensor parallelism, and last of the number of processes."""
    for to, recompute in changes(plan):
        total = plan.memory_of(to, recompute).total
        if plan.available_bytes is not None and total <= plan.available_bytes:
            return f"try {' '.join(_differences(plan, to, recompute))}, which needs {gib(total)}"
    if plan.cluster.is_local:
        return "shorten batch.sequence_length, or use a smaller model or more machines"
    return "shorten batch.sequence_length or use a smaller model"


def changes(plan: Plan) -> Iterator[tuple[Layout, RecomputeConfig]]:
    """Yield other layouts with their recomputation, the smallest change first."""
    layout, now = plan.layout, plan.conditions.recompute
    recomputes = [now]
    if family_of(plan.model).has_stages and now.mode in ("none", "selective"):
        recomputes.append(RecomputeConfig("full"))
    found = [
        (to, recompute)
        for tensor, recompute in itertools.product(_tensor_sizes(plan), recomputes)
        for to in _with_tensor(layout, tensor)
    ]

    def cost(change: tuple[Layout, RecomputeConfig]) -> int:
        to, recompute = change
        return (
            (to.zero != layout.zero)
            + (to.micro_size != layout.micro_size)
            + 2 * (recompute != now)
            + 3 * (to.tensor != layout.tensor)
        )

    # The sort is stable: the lower ZeRO stage and the larger micro-batch stay first.
    yield from sorted(found, key=cost)
    if not plan.cluster.is_local:
        for tensor, recompute in itertools.product(_tensor_sizes(plan), recomputes):
            yield from ((to, recompute) for to in _with_more_processes(layout, tensor))


def _tensor_sizes(plan: Plan) -> list[int]:
    """Return the sizes of the tensor axis that the model and one host allow, the current one first."""
    now = plan.layout.tensor
    model: Any = plan.model
    if not family_of(model).has_stages:
        return [now]
    host = plan.cluster.devices_per_node or plan.layout.world_size
    larger = [
        size
        for size in range(now + 1, host + 1)
        if host % size == 0
        and model.kv_heads % (size * plan.layout.sequence) == 0
        and model.mlp_width % size == 0
        and plan.layout.sequence_length % (size * plan.layout.sequence) == 0
    ]
    return [now, *larger]


def _differences(plan: Plan, to: Layout, recompute: RecomputeConfig) -> Iterator[str]:
    layout = plan.layout
    if to.world_size != layout.world_size:
        yield f"{to.world_size} processes"
    if to.tensor != layout.tensor:
        yield f"parallel.tensor={to.tensor}"
    if to.zero != layout.zero:
        yield f"parallel.zero={to.zero} engine=deepspeed"
    if recompute != plan.conditions.recompute:
        yield f"recompute={recompute.mode}"
    if to.micro_size != layout.micro_size:
        yield f"batch.micro_size={to.micro_size}"


def _with_tensor(layout: Layout, tensor: int) -> Iterator[Layout]:
    """Yield layouts of the same number of processes with this tensor axis, by ZeRO stage and micro-batch."""
    data, rest = divmod(layout.world_size, tensor * layout.pipeline * layout.sequence)
    if rest or layout.global_size % data:
        return
    highest = 1 if layout.pipeline > 1 else 3
    stages = (
        range(layout.zero, max(highest, layout.zero) + 1) if data * layout.sequence > 1 else [layout.zero]
    )
    replica_size = layout.global_size // data
    micro_sizes = [size for size in range(layout.micro_size, 0, -1) if replica_size % size == 0]
    for zero, micro in itertools.product(stages, micro_sizes):
        yield replace(
            layout,
            tensor=tensor,
            data=data,
            zero=zero,
            micro_size=micro,
            accumulation=replica_size // micro,
        )


def _with_more_processes(layout: Layout, tensor: int) -> Iterator[Layout]:
    """Yield layouts of more replicas, at the highest ZeRO stage and a micro-batch of one sample."""
    others = tensor * layout.pipeline * layout.sequence
    for data in range(1, layout.global_size + 1):
        if layout.global_size % data == 0 and data * others > layout.world_size:
            yield replace(
                layout,
                world_size=data * others,
                tensor=tensor,
                data=data,
                zero=1 if layout.pipeline > 1 else 3,
                micro_size=1,
                accumulation=layout.global_size // data,
            )
