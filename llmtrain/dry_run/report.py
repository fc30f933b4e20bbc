"""A rehearsal as text and as JSON, beside what the plan says of the same rank."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from llmtrain.dry_run.record import Rehearsal, Traffic
from llmtrain.plan.estimate import Plan
from llmtrain.plan.units import gib

OF_TENSORS = ("weights", "gradients", "optimizer", "activations", "logits", "buffers")
"""Terms of the plan's memory that tensors of a step take; the others are no tensors of the engine."""


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
        "of tensors without values"
    )
    yield f"{'kept between steps':<28}{gib(rehearsal.held_bytes):>14}"
    planned = gib(planned_peak(rehearsal, plan))
    yield f"{'most during a step':<28}{gib(rehearsal.peak_bytes):>14}, where the plan says {planned}"
    yield f"{'collectives of a step':<28}{'ranks':>8}{'number':>10}{'bytes':>22}"
    yield from _traffic(rehearsal.step)


def as_json(rehearsal: Rehearsal, plan: Plan) -> dict[str, Any]:
    """Return the same as one JSON object."""
    return {
        "rank": rehearsal.rank,
        "coordinates": rehearsal.coordinates._asdict(),
        "layers": rehearsal.layers,
        "parameters": rehearsal.parameters,
        "micro_batches": rehearsal.micro_batches,
        "kept_bytes": rehearsal.held_bytes,
        "peak_bytes": rehearsal.peak_bytes,
        "planned_peak_bytes": planned_peak(rehearsal, plan),
        "collectives": [
            {"kind": kind, "ranks": size, "number": number, "bytes": rehearsal.step.sizes[kind, size]}
            for (kind, size), number in sorted(rehearsal.step.calls.items())
        ],
    }


def planned_peak(rehearsal: Rehearsal, plan: Plan) -> int:
    """Return the bytes that the plan's terms say of the tensors of the same stage."""
    terms = plan.stage_memory[rehearsal.coordinates.pipeline].terms
    return sum(terms.get(name, 0) for name in OF_TENSORS)


def _traffic(traffic: Traffic) -> Iterator[str]:
    for (kind, size), number in sorted(traffic.calls.items()):
        yield f"  {kind:<26}{size:>8,}{number:>10,}{traffic.sizes[kind, size]:>22,}"
