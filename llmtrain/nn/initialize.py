"""Initial weights from a seed, equal for all layouts.

A model describes them by a table (`initializers()`: name pattern → initializer). A value is a function of
only (seed, parameter name, row and column in the whole parameter). Each rank can thus generate its own
shard, plus at most the edges of neighboring shards, of the same model in every layout.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from fnmatch import fnmatchcase
from typing import Any

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from llmtrain.nn.state import named_state
from llmtrain.tensor_boxes import Box, Shard, matrix_shape

_FILLS = frozenset({Tensor.normal_, Tensor.uniform_, Tensor.fill_, Tensor.zero_})

TILE = 256
"""Rows and columns drawn from one generator. Part of the definition: another value gives another model."""


@contextmanager
def on_meta() -> Iterator[None]:
    """Build modules on the meta device without filling their parameters.

    To fill them torch would import its compiler, which takes seconds at each start.
    """
    with torch.device("meta"), _Unfilled():
        yield


class _Unfilled(TorchFunctionMode):
    def __torch_function__(
        self, function: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        settings = kwargs or {}
        if function in _FILLS or getattr(function, "__module__", None) == nn.init.__name__:
            filled = args[0] if args else settings["tensor"]
            if filled.is_meta:
                return filled
        return function(*args, **settings)


@dataclass(frozen=True)
class Normal:
    """N(0, std²)."""

    std: float


@dataclass(frozen=True)
class NormalByRow:
    """N(0, std²), with the next of `stds` in turn for each `rows` rows: for parts packed into one matrix."""

    stds: tuple[float, ...]
    rows: int


@dataclass(frozen=True)
class Uniform:
    """Uniform between -bound and bound."""

    bound: float


@dataclass(frozen=True)
class Constant:
    value: float


Initializer = Normal | NormalByRow | Uniform | Constant


def match_initializers(table: Mapping[str, Initializer], names: Iterable[str]) -> dict[str, Initializer]:
    """Return the initializer of each parameter name.

    Raise ValueError unless each name matches exactly one pattern and each pattern at least one name.
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


def added_to(model: nn.Module) -> dict[str, Initializer]:
    """Return name → initializer of the parameters that were added to a model from outside."""
    added: dict[str, Initializer] = getattr(model, "added", {})
    return added


def initializers_of(model: nn.Module) -> dict[str, Initializer]:
    """Return the initializer of each parameter and statistic: those of the model's table, and of what was
    added to it.

    Raise ValueError as `match_initializers` does.
    """
    added = added_to(model)
    own = [name for name in named_state(model) if name not in added]
    return {**match_initializers(model.initializers(), own), **added}  # type: ignore[operator]


def fill_box(name: str, initializer: Initializer, seed: int, shape: tuple[int, ...], box: Box) -> Tensor:
    """Return the elements of `box` in the parameter `name` of `shape`: (rows, columns) fp32, on the CPU.

    The time is proportional to the tiles that the box touches.
    """
    if isinstance(initializer, Constant):
        return torch.full((box.rows, box.columns), initializer.value)
    rows, columns = matrix_shape(shape)
    values = torch.empty(box.rows, box.columns)
    for top in range(box.row // TILE * TILE, box.row + box.rows, TILE):
        for left in range(box.column // TILE * TILE, box.column + box.columns, TILE):
            tile = Box(top, left, min(TILE, rows - top), min(TILE, columns - left))
            drawn = torch.empty(tile.rows, tile.columns)
            _draw(drawn, initializer, _generator(seed, name, top, left), top)
            part = tile.intersection(box)
            assert part is not None
            _rows(values, box, part).copy_(_rows(drawn, tile, part))
    return values


def _rows(values: Tensor, box: Box, part: Box) -> Tensor:
    """Return the elements of `part` in the `values` of `box`."""
    row, column = part.row - box.row, part.column - box.column
    return values[row : row + part.rows, column : column + part.columns]


@torch.no_grad()
def fill(out: Tensor, name: str, initializer: Initializer, seed: int, shard: Shard, start: int = 0) -> None:
    """Write elements of the flattened `shard`, from `start` on, into `out` (1-D, any device and dtype);
    padding becomes 0."""
    if shard.is_padded:
        out.zero_()
    for box, place in shard.pieces(start, start + out.numel()):
        # In bands, so that a large parameter is never held twice.
        for top in range(0, box.rows, 4 * TILE):
            band = box._replace(row=box.row + top, rows=min(4 * TILE, box.rows - top))
            begin = place.start + top * box.columns
            values = fill_box(name, initializer, seed, shard.shape, band)
            out[begin : begin + band.numel] = values.view(-1).to(out.device, out.dtype)


def initialize(model: nn.Module, seed: int, shards: Mapping[str, Shard] | None = None) -> None:
    """Fill each parameter of `model` that is not on the meta device, as `initializers_of` says.

    shards: which part of the whole each parameter is; those not named are whole.

    Raise ValueError if the table doesn't match the parameters.
    """
    parameters = named_state(model)
    for name, initializer in initializers_of(model).items():
        parameter = parameters[name]
        if parameter.device.type != "meta":
            shard = (shards or {}).get(name, Shard(tuple(parameter.shape)))
            fill(parameter.detach().view(-1), name, initializer, seed, shard)


def _generator(seed: int, name: str, top: int, left: int) -> torch.Generator:
    digest = hashlib.blake2b(f"{seed}\0{name}\0{top}\0{left}".encode(), digest_size=8).digest()
    return torch.Generator().manual_seed(int.from_bytes(digest, "little", signed=True))


def _draw(
    out: Tensor, initializer: Normal | NormalByRow | Uniform, generator: torch.Generator, first_row: int
) -> None:
    match initializer:
        case Normal(std):
            out.normal_(0.0, std, generator=generator)
        case NormalByRow(stds, rows):
            row = torch.arange(first_row, first_row + out.shape[0])
            out.normal_(generator=generator).mul_(torch.tensor(stds)[row // rows % len(stds), None])
        case Uniform(bound):
            out.uniform_(-bound, bound, generator=generator)
