"""Weights from a seed, the same whatever the layout.

A model says by a table what its parameters start from (`initializers()`: name pattern → initializer);
a value is a function of (seed, parameter name, index in the flat full parameter) alone. A rank can so
make its own shard, and no other, of the one model that every layout shares.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from fnmatch import fnmatchcase

import torch
from torch import Tensor, nn

CHUNK = 2**16
"""Consecutive elements drawn from one generator. Part of the definition: another value, another model."""


@dataclass(frozen=True)
class Normal:
    """N(0, std²)."""

    std: float


@dataclass(frozen=True)
class Uniform:
    """Uniform between -bound and bound."""

    bound: float


@dataclass(frozen=True)
class Constant:
    value: float


Initializer = Normal | Uniform | Constant


def match_initializers(table: Mapping[str, Initializer], names: Iterable[str]) -> dict[str, Initializer]:
    """The initializer of each parameter name.

    Raises ValueError unless each name matches exactly one pattern and each pattern some name.
    """
    matched: dict[str, Initializer] = {}
    used: set[str] = set()
    for name in names:
        patterns = [pattern for pattern in table if fnmatchcase(name, pattern)]
        if len(patterns) != 1:
            raise ValueError(f"parameter {name} matches {patterns or 'no pattern'}; it needs exactly one")
        used.update(patterns)
        matched[name] = table[patterns[0]]
    unused = sorted(set(table) - used)
    if unused:
        raise ValueError(f"initializer patterns that match no parameter: {', '.join(unused)}")
    return matched


def fill_slice(name: str, initializer: Initializer, seed: int, start: int, stop: int) -> Tensor:
    """Elements [start, stop) of the flat full parameter `name`: 1-D fp32, on the CPU."""
    if isinstance(initializer, Constant):
        return torch.full((stop - start,), initializer.value)
    values = torch.empty(stop - start)
    draw = torch.empty(CHUNK)
    for chunk in range(start // CHUNK, -(-stop // CHUNK)):
        _draw(draw, initializer, _generator(seed, name, chunk))
        first, last = max(start, chunk * CHUNK), min(stop, (chunk + 1) * CHUNK)
        values[first - start : last - start] = draw[first - chunk * CHUNK : last - chunk * CHUNK]
    return values


@torch.no_grad()
def initialize(model: nn.Module, seed: int) -> None:
    """Fill every parameter of `model` (any device but meta, any dtype) by its own table.

    Raises ValueError for a table that doesn't fit the parameters.
    """
    parameters = dict(model.named_parameters())
    table = model.initializers()  # type: ignore[operator]
    for name, initializer in match_initializers(table, parameters).items():
        flat = parameters[name].view(-1)
        # By pieces, so that a large parameter is never held twice.
        for start in range(0, flat.numel(), 64 * CHUNK):
            stop = min(flat.numel(), start + 64 * CHUNK)
            flat[start:stop] = fill_slice(name, initializer, seed, start, stop).to(flat.device, flat.dtype)


def _generator(seed: int, name: str, chunk: int) -> torch.Generator:
    digest = hashlib.blake2b(f"{seed}\0{name}\0{chunk}".encode(), digest_size=8).digest()
    return torch.Generator().manual_seed(int.from_bytes(digest, "little", signed=True))


def _draw(out: Tensor, initializer: Normal | Uniform, generator: torch.Generator) -> None:
    if isinstance(initializer, Normal):
        out.normal_(0.0, initializer.std, generator=generator)
    else:
        out.uniform_(-initializer.bound, initializer.bound, generator=generator)
