"""With debug.collectives: the last collectives of a rank, with all that must be equal on the other ranks."""

from __future__ import annotations

import contextlib
import math
import mmap
import sys
import zlib
from pathlib import Path
from struct import Struct
from typing import Any

import torch

from llmtrain.watch import layout

RECORD = Struct("<QqIIiiBBBBI4q")
"""One layout.RECORD."""
COMPARED = Struct("<qiBBBB4q")
TOTAL = Struct("<Q")
MAX_DIMS = 4
DTYPES = tuple(
    dict.fromkeys(v for name in sorted(dir(torch)) if isinstance(v := getattr(torch, name), torch.dtype))
)
NO_TENSOR = 255
SEVERAL = 255
_DTYPE_NUMBERS = {dtype: number for number, dtype in enumerate(DTYPES)}
_SENDS = layout.KIND_NAMES.index("send")
_RECEIVES = layout.KIND_NAMES.index("recv")
_PACKAGES = Path(torch.__file__).parent.parent
_HELPERS = tuple(
    str(path)
    for path in (
        Path(torch.__file__).parent,
        _PACKAGES / "deepspeed" / "comm",
        _PACKAGES / "deepspeed" / "utils",
        Path(contextlib.__file__),
        Path(__file__).parent,
        Path(__file__).parent.parent / "distributed" / "processes.py",
    )
)
"""Files of functions that call a collective for others: the line of their caller tells more."""

assert RECORD.size == layout.RECORD.itemsize


class Ring:
    """Writes the collectives of this rank into its file."""

    def __init__(self, buffer: mmap.mmap, places: list[str]) -> None:
        """places: receives the source lines that records number."""
        self._buffer, self._places = buffer, places
        self._numbers: dict[tuple[str, int], int] = {}
        self._chains: dict[int, int] = {}
        self._counts: dict[int, int] = {}
        self._total = 0

    def add(
        self,
        key: int,
        kind_number: int,
        kind: layout.Kind,
        tensors: list[torch.Tensor],
        arguments: tuple[Any, ...],
        step: int,
        micro: int,
    ) -> None:
        """Add the next collective among the ranks of this key: ranks call those of all groups that have the
        same ranks in one order."""
        number = self._counts[key] = self._counts.get(key, 0) + 1
        shape, dtype, dims = [0] * MAX_DIMS, NO_TENSOR, 0
        if tensors:
            dtype = _DTYPE_NUMBERS[tensors[0].dtype]
            if kind.same_shape:
                dims, shape = _folded(tensors)
        # The two ends of a message must agree. Stages may be at different micro-batches.
        compared_kind = _SENDS if kind_number == _RECEIVES else kind_number
        op = _operation(arguments)
        compared = COMPARED.pack(number, step, compared_kind, dtype, dims, op, *shape)
        chain = self._chains[key] = zlib.crc32(compared, self._chains.get(key, 0))
        at = layout.RING_AT + 16 + self._total % layout.RING_CALLS * RECORD.size
        place = self._place()
        RECORD.pack_into(
            self._buffer, at, key, number, chain, place, step, micro, kind_number, dtype, dims, op, 0, *shape
        )
        self._total += 1
        TOTAL.pack_into(self._buffer, layout.RING_AT, self._total)

    def _place(self) -> int:
        """Return the number of the source line that called the collective."""
        frame = sys._getframe(3)
        while frame.f_back is not None and frame.f_code.co_filename.startswith(_HELPERS):
            frame = frame.f_back
        line = frame.f_code.co_filename, frame.f_lineno
        found = self._numbers.get(line)
        if found is None:
            found = self._numbers[line] = len(self._places)
            self._places.append(f"{line[0]}:{line[1]}")
        return found


def tensors_of(arguments: tuple[Any, ...], number: int | None) -> list[torch.Tensor]:
    """Return the tensors of an argument of a collective, which may be lists of lists."""
    if number is None or number >= len(arguments):
        return []
    found = arguments[number]
    while isinstance(found, (list, tuple)):
        if not found or isinstance(found[0], torch.Tensor):
            return list(found)
        found = found[0]
    return [found] if isinstance(found, torch.Tensor) else []


def _folded(tensors: list[torch.Tensor]) -> tuple[int, list[int]]:
    """Return the number of dims, and MAX_DIMS numbers that differ for different shapes: the dims, of which
    the last ones are multiplied; of SEVERAL tensors their number and a checksum of their shapes."""
    if len(tensors) > 1:
        return SEVERAL, [len(tensors), zlib.crc32(repr([tuple(t.shape) for t in tensors]).encode()), 0, 0]
    shape = list(tensors[0].shape)
    if len(shape) > MAX_DIMS:
        folded = [*shape[: MAX_DIMS - 1], math.prod(shape[MAX_DIMS - 1 :])]
        return MAX_DIMS, folded
    return len(shape), [*shape, *[0] * (MAX_DIMS - len(shape))]


def _operation(arguments: tuple[Any, ...]) -> int:
    """Return a number for the root or the operation of a collective."""
    options = arguments[-1] if arguments else None
    root = getattr(options, "rootRank", None)
    if root is not None:
        return int(root) & 255
    operation = getattr(getattr(options, "reduceOp", None), "op", None)
    return 0 if operation is None else int(operation) & 255
