"""The legal values nearest to a refused one, for the remedies of messages."""

from __future__ import annotations

from llmtrain.parallel.config import BatchConfig, ParallelConfig


def processes_per_replica(parallel: ParallelConfig) -> int:
    """Return the number of processes of one data-parallel replica."""
    return parallel.tensor * parallel.pipeline * parallel.sequence


def nearest_micro_sizes(batch: BatchConfig, data: int, limit: int = 3) -> list[int]:
    """Return up to `limit` micro sizes nearest to the given one that divide global_size on `data` replicas;
    empty if none does."""
    if batch.global_size % data:
        return []
    per_replica = batch.global_size // data
    divisors = {
        d for i in range(1, int(per_replica**0.5) + 1) if per_replica % i == 0 for d in (i, per_replica // i)
    }
    return sorted(sorted(divisors, key=lambda d: (abs(d - batch.micro_size), d))[:limit])


def nearest_global_sizes(batch: BatchConfig, data: int) -> list[int]:
    """Return the next global sizes below and above the given one that micro_size · `data` divides."""
    return nearest_multiples(batch.global_size, data * batch.micro_size)


def nearest_multiples(value: int, unit: int) -> list[int]:
    """Return the multiples of `unit`, 1 or more, next below (or equal to) and above `value`."""
    below = value // unit * unit
    return [multiple for multiple in (below, below + unit) if multiple >= 1]


def most_stages(parallel: ParallelConfig, num_layers: int, world_size: int) -> int:
    """Return the largest number of pipeline stages that gives each stage a layer and divides `world_size`."""
    others = parallel.tensor * parallel.sequence
    legal = (p for p in range(num_layers, 0, -1) if world_size % (p * others) == 0)
    return next(legal, 1)


def around(values: list[int], wanted: int) -> list[int]:
    """Return the next of the ascending `values` below (or equal to) and above `wanted`."""
    below = [value for value in values if value <= wanted][-1:]
    return below + [value for value in values if value > wanted][:1]


def listed(values: list[int]) -> str:
    """Return the values as a message lists them."""
    return ", ".join(map(str, values))
