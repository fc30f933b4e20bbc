"""The figures of a run as text: the two lines that a start prints, and the table of `llmtrain plan`."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from llmtrain.plan import costs
from llmtrain.plan.estimate import Plan
from llmtrain.plan.fit import warnings
from llmtrain.plan.times import text as times
from llmtrain.plan.units import digits, duration, gib, quantity

NOT_AT_ONCE = "not at once"
"""The term that is left out of the table where it is 0."""


def summary(plan: Plan) -> str:
    """Return two lines, and one more for each warning."""
    layout = plan.layout
    lines = [
        f"{_parameters_text(plan)}; {plan.steps:,} steps of {layout.global_size:,} samples "
        f"(data {layout.data} · micro_size {layout.micro_size} · accumulation {layout.accumulation}) = "
        f"{plan.total_tokens:,} {plan.unit}s",
        f"memory of one process: about {gib(plan.memory.total)}"
        + (f" of {gib(plan.available_bytes)}" if plan.available_bytes is not None else ""),
    ]
    return "\n".join(lines + [f"warning: {text}" for text in warnings(plan)])


def table(plan: Plan) -> str:
    """Return all figures as aligned lines."""
    return "\n".join(_lines(plan))


def _lines(plan: Plan) -> Iterator[str]:
    layout = plan.layout

    def row(name: str, text: str) -> str:
        return f"{name:<17} {text}"

    yield row("model", f"{plan.model.family}, {_parameters_text(plan)}")
    yield row("compute", f"{quantity(plan.flops_per_token, 'FLOP')} per {plan.unit}, forward and backward")
    yield row(
        "layout",
        f"world_size {layout.world_size:,} = data {layout.data} · tensor {layout.tensor} · "
        f"pipeline {layout.pipeline} · sequence {layout.sequence}; ZeRO {layout.zero}, {plan.precision}"
        + ("; tokens shared in the tensor group" if layout.tensor_sequence else ""),
    )
    yield row("recompute", _recompute_text(plan))
    if layout.pipeline > 1:
        yield row(
            "pipeline",
            f"{layout.pipeline} stages, {layout.accumulation} micro-batches a step: "
            f"{plan.bubble:.1%} of it idle ({'1F1B' if plan.assume.virtual_stages == 1 else 'interleaved'})",
        )
    yield row(
        "batch",
        f"{layout.global_size:,} samples = data {layout.data} · micro_size {layout.micro_size} · "
        f"accumulation {layout.accumulation}; {plan.tokens_per_step:,} {plan.unit}s per step",
    )
    yield row(
        "run",
        f"{plan.steps:,} steps, {plan.total_tokens:,} {plan.unit}s, {quantity(plan.total_flops, 'FLOP')}",
    )
    yield from (row(name, words) for name, words in _time(plan))
    if plan.time is not None:
        yield from times.lines(plan.time)
    yield "memory of one process" + (" of the stage that holds most" if layout.pipeline > 1 else "")
    for name, size in plan.memory.terms.items():
        if size or name != NOT_AT_ONCE:
            yield f"  {name:<15} {gib(size):>12}"
    verdict = ""
    if plan.available_bytes is not None:
        verdict = f" of {gib(plan.available_bytes)}, {plan.cluster.name}: "
        verdict += "does not fit" if plan.is_too_large else "fits"
    yield f"  {'total':<15} {gib(plan.memory.total):>12}{verdict}"
    yield f"  {'at start':<15} {gib(plan.start_bytes):>12}"
    if plan.state_copies:
        copies = f"{plan.state_copies} times {gib(plan.saved_bytes)}"
        yield f"host memory for copies of one process' state: {copies} (checkpoint.memory)"
    for text in warnings(plan):
        yield f"warning: {text}"


def _time(plan: Plan) -> Iterator[tuple[str, str]]:
    """Yield what the run takes: a step, all steps, energy and price, and what bounds it."""
    if plan.time is None or plan.seconds is None:
        how = (
            "llmtrain plan calibrate measures this machine" if plan.cluster.is_local else "see conf/cluster/"
        )
        yield "time", f"unknown: {plan.cluster.name} has no figures for {plan.precision}; {how}"
        return
    rate, utilization = plan.tokens_per_second_per_device, plan.utilization
    assert rate is not None
    assert utilization is not None
    yield (
        "step",
        f"{times.milliseconds(plan.time.seconds)} on {plan.cluster.name}: {digits(rate, 5)} {plan.unit}s per "
        f"second and device, {utilization:.1%} of the peak",
    )
    whole = rate * plan.layout.world_size
    yield "time", f"{duration(plan.seconds)}, {whole:,.0f} {plan.unit}s per second"
    yield from costs.lines(plan)
    yield "bound by", times.bound(plan.time)


def as_json(plan: Plan) -> dict[str, Any]:
    """Return the figures as one JSON object; null where a figure is not known."""
    time = plan.time
    return {
        "parameters": plan.parameters,
        "flops_per_token": plan.flops_per_token,
        "world_size": plan.layout.world_size,
        "layout": {axis: getattr(plan.layout, axis) for axis in ("data", "tensor", "pipeline", "sequence")}
        | {"zero": plan.layout.zero, "tensor_sequence": plan.layout.tensor_sequence},
        "micro_size": plan.layout.micro_size,
        "accumulation": plan.layout.accumulation,
        "recompute": plan.conditions.recompute.mode,
        "cluster": plan.cluster.name,
        "tokens_per_step": plan.tokens_per_step,
        "seconds_per_step": None if time is None else time.seconds,
        "tokens_per_second_per_device": plan.tokens_per_second_per_device,
        "model_flops_utilization": plan.utilization,
        "parts": {} if time is None else {name: seconds for name, seconds in time.parts.items() if seconds},
        "memory": [{**stage.terms, "total": stage.total} for stage in plan.stage_memory],
        "available_bytes": plan.available_bytes,
        "fits": None if plan.available_bytes is None else not plan.is_too_large,
        "seconds": plan.seconds,
        "kilowatt_hours": costs.kilowatt_hours(plan),
        "dollars": costs.dollars(plan),
    }


def _parameters_text(plan: Plan) -> str:
    trained = "" if plan.trainable is None else f", of which {plan.trainable.parameters:,} train"
    return f"{plan.parameters:,} parameters{trained}"


def _recompute_text(plan: Plan) -> str:
    recompute = plan.conditions.recompute
    if recompute.mode == "none" or recompute.every == 1:
        return recompute.mode
    return f"{recompute.mode}, one layer in {recompute.every}"
