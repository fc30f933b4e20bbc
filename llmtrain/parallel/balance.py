"""Divide consecutive items into runs of about equal weight, for the stages of a pipeline. Pure arithmetic."""

from __future__ import annotations

import itertools
from collections.abc import Sequence


def balance(weights: Sequence[float], parts: int) -> list[range]:
    """Divide consecutive items into `parts` nonempty runs, minimizing the weight of the heaviest run.

    Raise ValueError if there are more parts than items.
    """
    count = len(weights)
    if parts > count:
        raise ValueError(f"{count} items cannot make {parts} runs")
    sums = [0.0]
    for weight in weights:
        sums.append(sums[-1] + weight)
    # Dynamic programming. best[n]: (heaviest run, cuts) of the first n items, with one more run in each
    # iteration.
    best: dict[int, tuple[float, list[int]]] = {0: (0.0, [])}
    for part in range(1, parts + 1):
        best = {
            stop: min(
                (max(heaviest, sums[stop] - sums[start]), [*cuts, stop])
                for start, (heaviest, cuts) in best.items()
                if start < stop
            )
            for stop in range(part, count - (parts - part) + 1)
        }
    bounds = [0, *best[count][1]]
    return [range(start, stop) for start, stop in itertools.pairwise(bounds)]


def stage_runs(weights: Sequence[float], stages: int) -> list[range]:
    """Balance the steps of a forward pass (embedding, blocks, head) so that each run contains a block:
    DeepSpeed requires parameters of the same optimizer groups in every stage, and embeddings have no
    norms."""
    first, *between, last = weights
    between[0] += first
    between[-1] += last
    end = len(weights)
    runs = balance(between, stages)
    return [
        range(run.start + 1 if run.start else 0, end if run.stop == len(between) else run.stop + 1)
        for run in runs
    ]
