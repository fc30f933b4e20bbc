"""Time of a pipeline's schedule, step by step: 1F1B and its interleaved form (arXiv:2104.04473, 2.2)."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple


class Work(NamedTuple):
    """One pass through one run of layers (a chunk) of a stage."""

    is_forward: bool
    micro_batch: int
    chunk: int


def simulated_seconds(
    forward: Sequence[float], backward: Sequence[float], micro_batches: int, transfer: float, chunks: int = 1
) -> float:
    """Return the time until every stage has done all its work.

    forward, backward: seconds of one micro-batch in each stage, over all its chunks.
    transfer: seconds to hand a micro-batch on to the next stage.
    chunks: runs of layers of each stage; several need micro-batches in multiples of the stages, and are
        rounded up to that.
    """
    stages = len(forward)
    if stages == 1:
        return micro_batches * (forward[0] + backward[0])
    if chunks > 1:
        micro_batches = -(-micro_batches // stages) * stages
    orders = [schedule(stage, stages, micro_batches, chunks) for stage in range(stages)]
    done: dict[tuple[bool, int, int], float] = {}
    times, places = [0.0] * stages, [0] * stages
    last = stages * chunks - 1
    remaining = sum(map(len, orders))
    while remaining:
        before = remaining
        for stage in range(stages):
            order, place, time = orders[stage], places[stage], times[stage]
            while place < len(order):
                is_forward, micro_batch, chunk = order[place]
                layer = chunk * stages + stage
                if is_forward:
                    ready = 0.0 if layer == 0 else done.get((True, micro_batch, layer - 1), -1.0)
                else:
                    needed = (True, micro_batch, layer) if layer == last else (False, micro_batch, layer + 1)
                    ready = done.get(needed, -1.0)
                if ready < 0:
                    break
                has_come = layer not in ((0,) if is_forward else (last,))
                start = max(time, ready + (transfer if has_come else 0.0))
                time = start + (forward if is_forward else backward)[stage] / chunks
                done[is_forward, micro_batch, layer] = time
                place += 1
                remaining -= 1
            places[stage], times[stage] = place, time
        assert remaining < before, "the schedule waits for itself"
    return max(times)


def schedule(stage: int, stages: int, micro_batches: int, chunks: int) -> list[Work]:
    """Return the work of a stage in its order: forward passes until the first backward pass can begin, then
    one of each by turns, then the remaining backward passes."""
    total = micro_batches * chunks
    if chunks == 1:
        ahead = min(stages - stage - 1, total)
    else:
        ahead = min(2 * (stages - stage - 1) + (chunks - 1) * stages, total)
    forwards = [_nth(number, stages, chunks, True) for number in range(total)]
    backwards = [_nth(number, stages, chunks, False) for number in range(total)]
    order = forwards[:ahead]
    for number in range(total - ahead):
        order += [forwards[ahead + number], backwards[number]]
    return order + backwards[total - ahead :]


def _nth(number: int, stages: int, chunks: int, is_forward: bool) -> Work:
    """Return the work of a number: as many micro-batches as stages through each chunk, by turns."""
    if chunks == 1:
        return Work(is_forward, number, 0)
    turn, within = divmod(number, stages * chunks)
    chunk, micro_batch = divmod(within, stages)
    return Work(is_forward, turn * stages + micro_batch, chunk if is_forward else chunks - 1 - chunk)


def estimated_seconds(
    forward: Sequence[float], backward: Sequence[float], micro_batches: int, transfer: float, chunks: int = 1
) -> float:
    """Return about what `simulated_seconds` does, at once: the slowest stage is always at work, but while the
    pipeline fills and drains."""
    both = [f + b for f, b in zip(forward, backward, strict=True)]
    slowest = max(both)
    stages = len(both)
    return micro_batches * slowest + (sum(both) - slowest) / chunks + 2 * (stages - 1) * transfer
