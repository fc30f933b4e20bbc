"""What a search found, as text or as JSON."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

from llmtrain.plan.search import Candidate, Found
from llmtrain.plan.times.text import milliseconds
from llmtrain.plan.units import digits, gib

WIDTH, HEIGHT = 64, 12
"""Characters of the picture of times and memories."""


def lines(found: Found, command: Sequence[str], why: str | None) -> Iterator[str]:
    """Yield the text. command: what the overrides are appended to; why: about the user's own choice."""
    yield f"{found.tried:,} choices, of which {found.fitting:,} fit"
    yield f"{'step':>11} {'tokens/s':>10} {'memory':>11}  command"
    for each in found.best:
        yield (
            f"{milliseconds(each.seconds):>11} {digits(each.tokens_per_second_per_device, 5):>10} "
            f"{gib(each.memory_bytes):>11}  {' '.join([*command, *_overrides(each)])}"
        )
    if why is not None:
        yield why
    if len(found.front) > 1:
        yield "least time for each memory:"
        yield from picture(found.front)


def as_json(found: Found, command: Sequence[str], why: str | None) -> dict[str, Any]:
    """Return what was found as one JSON object."""
    return {
        "tried": found.tried,
        "fitting": found.fitting,
        "best": [_figures(each, command) for each in found.best],
        "front": [_figures(each, command) for each in found.front],
        "own": None if found.own is None else _figures(found.own, command),
        "why": why,
    }


def picture(front: Sequence[Candidate]) -> Iterator[str]:
    """Yield a picture of the choices that no other beats: memory to the right, seconds upward."""
    seconds = [each.seconds for each in front]
    sizes = [each.memory_bytes for each in front]
    low, high = min(seconds), max(seconds)
    least, most = min(sizes), max(sizes)
    marks = {
        (
            round((HEIGHT - 1) * (high - each.seconds) / (high - low or 1)),
            round((WIDTH - 1) * (each.memory_bytes - least) / (most - least or 1)),
        )
        for each in front
    }
    for row in range(HEIGHT):
        label = {0: milliseconds(high), HEIGHT - 1: milliseconds(low)}.get(row, "")
        yield (
            f"{label:>11} |"
            + "".join("o" if (row, column) in marks else " " for column in range(WIDTH)).rstrip()
        )
    yield " " * 12 + "+" + "-" * WIDTH
    yield f"{'':>13}{gib(least)}{gib(most):>{WIDTH - len(gib(least))}}"


def _overrides(each: Candidate) -> list[str]:
    return [f"world_size={each.choice.layout.world_size}", *each.choice.overrides()]


def _figures(each: Candidate, command: Sequence[str]) -> dict[str, Any]:
    layout = each.choice.layout
    return {
        "world_size": layout.world_size,
        "data": layout.data,
        "tensor": layout.tensor,
        "pipeline": layout.pipeline,
        "sequence": layout.sequence,
        "zero": layout.zero,
        "tensor_sequence": layout.tensor_sequence,
        "offload_optimizer": layout.offload_optimizer,
        "micro_size": layout.micro_size,
        "recompute": each.choice.recompute.mode,
        "seconds_per_step": each.seconds,
        "tokens_per_second_per_device": each.tokens_per_second_per_device,
        "memory_bytes": each.memory_bytes,
        "dollars_per_step": each.dollars,
        "command": " ".join([*command, *_overrides(each)]),
    }
