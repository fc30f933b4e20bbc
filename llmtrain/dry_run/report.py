"""A rehearsal as text and as JSON, beside the plan's figures for the same rank."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import replace
from typing import Any

from llmtrain.dry_run.record import Rehearsal, Traffic
from llmtrain.plan.estimate import Plan
from llmtrain.plan.times.collectives import Along
from llmtrain.plan.timing import sent_bytes_of
from llmtrain.plan.units import gib

OF_TENSORS = ("weights", "gradients", "optimizer", "activations", "logits", "buffers", "not at once")
"""Terms of the plan's memory that tensors of a step take; the others are no tensors of the engine."""
NAMES: dict[Along, str] = {
    "tensor": "in the tensor group",
    "sequence": "in the sequence group",
    "pipeline": "between stages",
    "weights": "weights, to replicas",
    "gradients": "gradients, to replicas",
}
OTHERS = "counts, norms and others"


def lines(rehearsal: Rehearsal, plan: Plan) -> Iterator[str]:
    """Yield what the rank did, and how the plan's arithmetic compares."""
    at = rehearsal.coordinates
    yield (
        f"dry run of rank {rehearsal.rank:,} of {plan.layout.world_size:,}: stage {at.pipeline}, "
        f"data {at.data}, sequence {at.sequence}, tensor {at.tensor}; {rehearsal.layers} layers, "
        f"{rehearsal.parameters:,} parameters"
    )
    yield (
        f"engine built in {rehearsal.setup_seconds:.1f} s, a step of {rehearsal.micro_batches} of "
        f"{plan.layout.accumulation} micro-batches made in {rehearsal.step_seconds:.1f} s, "
        f"of tensors without values; {rehearsal.processor_seconds:.1f} s of a processor"
    )
    yield f"{'kept between steps':<28}{gib(rehearsal.held_bytes):>14}"
    planned = gib(planned_peak(rehearsal, plan))
    yield f"{'most during a step':<28}{gib(rehearsal.peak_bytes):>14}, where the plan says {planned}"
    yield f"{'collectives of a step':<28}{'along':<18}{'ranks':>8}{'number':>10}{'bytes':>22}"
    yield from _traffic(rehearsal.step)
    yield from _comparison(rehearsal, plan)


def summary(rehearsals: Sequence[Rehearsal], plan: Plan) -> Iterator[str]:
    """Yield a table of several ranks, a row each: what they hold and send, beside the plan."""
    yield (
        f"{'rank':>9} {'stage':>6} {'layers':>7} {'parameters':>15} {'most':>11} {'planned':>11} "
        f"{'error':>7} {'collectives':>12} {'sent':>11} {'planned':>11} {'processor':>10}"
    )
    for each in rehearsals:
        planned, along = planned_peak(each, plan), list(sent(each, plan))
        theirs = [size for _, _, size in along]
        total = "unknown" if None in theirs else gib(sum(size or 0.0 for size in theirs))
        yield (
            f"{each.rank:>9,} {each.coordinates.pipeline:>6} {each.layers:>7} {each.parameters:>15,} "
            f"{gib(each.peak_bytes):>11} {gib(planned):>11} {planned / each.peak_bytes - 1:>+7.1%} "
            f"{sum(each.step.calls.values()):>12,} {gib(sum(ours for _, ours, _ in along)):>11} {total:>11} "
            f"{each.processor_seconds:>8.1f} s"
        )


def as_json(rehearsal: Rehearsal, plan: Plan) -> dict[str, Any]:
    """Return the same as one JSON object."""
    calls, sizes = rehearsal.step.calls, rehearsal.step.sizes
    return {
        "rank": rehearsal.rank,
        "coordinates": rehearsal.coordinates._asdict(),
        "layers": rehearsal.layers,
        "parameters": rehearsal.parameters,
        "micro_batches": rehearsal.micro_batches,
        "kept_bytes": rehearsal.held_bytes,
        "peak_bytes": rehearsal.peak_bytes,
        "planned_peak_bytes": planned_peak(rehearsal, plan),
        "seconds": rehearsal.setup_seconds + rehearsal.step_seconds,
        "processor_seconds": rehearsal.processor_seconds,
        "collectives": [
            {
                "kind": each.kind,
                "along": each.group,
                "ranks": each.size,
                "number": calls[each],
                "bytes": sizes[each],
            }
            for each in sorted(calls)
        ],
        "sent_bytes": {
            name: {"dry_run": ours, "plan": theirs} for name, ours, theirs in sent(rehearsal, plan)
        },
    }


def sent(rehearsal: Rehearsal, plan: Plan) -> Iterator[tuple[str, float, float | None]]:
    """Yield the bytes that the rank sent beside those of the plan: along each axis, and last those that the
    plan does not count. None: the plan has no figures."""
    layout = plan.layout
    ours = rehearsal.step.sent(layout)
    theirs = sent_bytes_of(plan, rehearsal.coordinates.pipeline, rehearsal.micro_batches)
    for along, name in NAMES.items():
        planned = None if theirs is None else theirs.get(along, 0.0)
        if ours.get(along, 0.0) or planned:
            yield name, ours.get(along, 0.0), planned
    yield OTHERS, ours.get(None, 0.0), None if theirs is None else 0.0


def planned_peak(rehearsal: Rehearsal, plan: Plan) -> int:
    """Return the bytes that the plan's terms say of the tensors of the same stage, on the CPU ranks that a
    rehearsal imagines."""
    on_cpu = replace(plan, conditions=replace(plan.conditions, device="cpu"))
    terms = on_cpu.stage_memory[rehearsal.coordinates.pipeline].terms
    return sum(terms.get(name, 0) for name in OF_TENSORS)


def _traffic(traffic: Traffic) -> Iterator[str]:
    for each, number in sorted(traffic.calls.items()):
        yield f"  {each.kind:<26}{each.group:<18}{each.size:>8,}{number:>10,}{traffic.sizes[each]:>22,}"


def _comparison(rehearsal: Rehearsal, plan: Plan) -> Iterator[str]:
    yield f"{'bytes that the rank sends':<28}{'dry run':>22}{'plan':>22}{'difference':>12}"
    for name, ours, theirs in sent(rehearsal, plan):
        if theirs is None:
            yield f"  {name:<26}{ours:>22,.0f}{'unknown':>22}"
            continue
        difference = f"{theirs / ours - 1:>+12.2%}" if ours and theirs else ""
        yield f"  {name:<26}{ours:>22,.0f}{theirs:>22,.0f}{difference}"
