"""Layouts for fewer processes than a user asked for: which axes shrink, within the bounds that he set."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import replace
from typing import NamedTuple

from llmtrain.errors import ConfigError
from llmtrain.parallel.config import BatchConfig, ParallelConfig
from llmtrain.parallel.layout import Layout

Plan = Callable[[ParallelConfig, BatchConfig], Layout]


class Fitted(NamedTuple):
    """A layout and the settings that it is of."""

    layout: Layout
    parallel: ParallelConfig
    batch: BatchConfig


def fit(parallel: ParallelConfig, batch: BatchConfig, world_size: int, plan: Plan) -> Fitted:
    """Return the layout as it was asked for, or where that does not fit, the first of `shrunk` that does.

    plan: returns the layout of `world_size` processes, or raises ConfigError. Raise that of the layout as it
    was asked for if none fits.
    """
    try:
        return Fitted(plan(parallel, batch), parallel, batch)
    except ConfigError as error:
        for smaller in shrunk(parallel, batch, world_size):
            try:
                return Fitted(plan(*smaller), *smaller)
            except ConfigError:
                continue
        raise error


def shrunk(
    parallel: ParallelConfig, batch: BatchConfig, world_size: int
) -> Iterator[tuple[ParallelConfig, BatchConfig]]:
    """Yield the settings for `world_size` processes in which axes of `parallel.elastic` are smaller.

    Replicas are given up first, then stages, then parts of matrices. The global batch stays; micro-batches
    become smaller where else they would not divide it.
    """
    for tensor in _sizes(parallel.tensor, "tensor" in parallel.elastic):
        for pipeline in _sizes(parallel.pipeline, "pipeline" in parallel.elastic):
            data, rest = divmod(world_size, tensor * pipeline * parallel.sequence)
            wanted = parallel.data
            if rest or data < 1 or (wanted is not None and data > wanted):
                continue
            if wanted is not None and data < wanted and "data" not in parallel.elastic:
                continue
            if batch.global_size % data:
                continue
            share = batch.global_size // data
            micro_size = next(
                size for size in range(min(batch.micro_size, share), 0, -1) if share % size == 0
            )
            yield (
                replace(parallel, data=wanted and data, tensor=tensor, pipeline=pipeline),
                replace(batch, micro_size=micro_size),
            )


def _sizes(size: int, may_shrink: bool) -> list[int]:
    """Return the sizes that an axis may have, the largest first."""
    return [s for s in range(size, 0, -1) if size % s == 0] if may_shrink else [size]
