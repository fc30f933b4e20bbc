"""The figures of a run as text: the two lines that a start prints, and the table of `llmtrain plan`."""

from __future__ import annotations

from collections.abc import Iterator

from llmtrain.plan.estimate import ASSUMED_MFU, Plan
from llmtrain.plan.fit import warnings
from llmtrain.plan.units import duration, gib, quantity


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
            f"{plan.bubble:.1%} of it idle (1F1B)",
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
    if plan.seconds is not None:
        rate = plan.total_tokens / plan.seconds
        yield row(
            "time",
            f"{duration(plan.seconds)} at {ASSUMED_MFU:.0%} of {plan.cluster.name}'s peak, "
            f"{rate:,.0f} {plan.unit}s per second",
        )
    yield "memory of one process" + (" of the stage that holds most" if layout.pipeline > 1 else "")
    for name, size in plan.memory.terms.items():
        yield f"  {name:<15} {gib(size):>12}"
    verdict = ""
    if plan.available_bytes is not None:
        verdict = f" of {gib(plan.available_bytes)}, {plan.cluster.name}: "
        verdict += "does not fit" if plan.is_too_large else "fits"
    yield f"  {'total':<15} {gib(plan.memory.total):>12}{verdict}"
    yield f"  {'at start':<15} {gib(plan.start_bytes):>12}"
    for text in warnings(plan):
        yield f"warning: {text}"


def _parameters_text(plan: Plan) -> str:
    trained = "" if plan.trainable is None else f", of which {plan.trainable.parameters:,} train"
    return f"{plan.parameters:,} parameters{trained}"


def _recompute_text(plan: Plan) -> str:
    recompute = plan.conditions.recompute
    if recompute.mode == "none" or recompute.every == 1:
        return recompute.mode
    return f"{recompute.mode}, one layer in {recompute.every}"
