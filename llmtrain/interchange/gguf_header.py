"""Read the header of a GGUF file: metadata of the model and locations of its tensors
(https://github.com/ggml-org/ggml/blob/master/docs/gguf.md).

The `gguf` package is not used for this, because it trusts counts and lengths. Here each is compared with the
size of the file before anything is allocated.
"""

from __future__ import annotations

import math
import struct
from collections.abc import Mapping
from dataclasses import dataclass
from math import prod
from pathlib import Path
from typing import Any, NoReturn

import numpy as np

from llmtrain.config import LARGEST_INT, show
from llmtrain.errors import CheckpointError, Problem

MAGIC = b"GGUF"
HEADER_BYTES = 64 << 20
"""Maximum size of the header; more than a vocabulary of two million tokens needs, with merges."""
MOST_NAMES = 1 << 16
"""Maximum number of keys, and of tensors, in a file."""
MOST_TEXTS = 1 << 22
"""Maximum number of texts in a list, such as tokens or merges."""
MOST_DIMS = 4
_VERSIONS = (2, 3)
_ALIGNMENT = "general.alignment"
_NUMBERS = {0: "u1", 1: "i1", 2: "u2", 3: "i2", 4: "u4", 5: "i4", 6: "f4", 10: "u8", 11: "i8", 12: "f8"}
"""Number of a type → numpy type code."""
_BOOL, _TEXT, _LIST = 7, 8, 9

Value = bool | int | float | str | list[str] | np.ndarray


@dataclass(frozen=True)
class Place:
    """Shape, format and location of a tensor in the file."""

    shape: tuple[int, ...]
    """Shape in the order of torch, rows first."""
    kind: int
    """Number of the format."""
    start: int
    """Offset in the file in bytes."""
    size: int
    """Size in bytes."""


@dataclass(frozen=True)
class Header:
    """The metadata of a file, and the locations of its tensors."""

    values: Mapping[str, Value]
    tensors: Mapping[str, Place]


def read_header(content: Any, formats: Mapping[int, tuple[int, int]]) -> Header:
    """Read the header of a file.

    content: buffer with the bytes of the file; formats: number of a format → (elements per block, bytes per
    block).
    Raise ValueError with a short reason if the header is damaged.
    """
    cursor = _Cursor(memoryview(content)[:HEADER_BYTES])
    if bytes(cursor.take(4)) != MAGIC:
        raise ValueError("it does not begin with GGUF")
    if (version := cursor.whole("u4")) not in _VERSIONS:
        # A file of the other byte order has its version in the upper half.
        kind = "with the highest byte first" if version & 0xFFFF == 0 else f"of version {version}"
        raise ValueError(f"{kind}; versions 2 and 3, with the lowest byte first, are read")
    num_tensors, num_keys = cursor.whole("u8"), cursor.whole("u8")
    if max(num_tensors, num_keys) > MOST_NAMES:
        raise ValueError(f"{num_keys:,} keys and {num_tensors:,} tensors, more than {MOST_NAMES:,}")
    values: dict[str, Value] = {}
    for _ in range(num_keys):
        key = cursor.text()
        if key in values:
            raise ValueError(f"the key {show(key)} twice")
        values[key] = cursor.value(cursor.whole("u4"))
    found: dict[str, tuple[tuple[int, ...], int, int]] = {}
    for _ in range(num_tensors):
        name = cursor.text()
        if name in found:
            raise ValueError(f"the tensor {show(name)} twice")
        if not 1 <= (num_dims := cursor.whole("u4")) <= MOST_DIMS:
            raise ValueError(f"{show(name)} of {num_dims:,} dims, not 1 to {MOST_DIMS}")
        dims = [cursor.whole("u8") for _ in range(num_dims)]
        found[name] = (tuple(reversed(dims)), cursor.whole("u4"), cursor.whole("u8"))
    alignment = values.get(_ALIGNMENT, 32)
    if not isinstance(alignment, int) or alignment < 1 or alignment & (alignment - 1):
        raise ValueError(f"{_ALIGNMENT} {show(alignment)}, not a power of two")
    begin = -(-cursor.at // alignment) * alignment
    places = {name: _place(name, *said, begin, formats) for name, said in found.items()}
    end = 0
    for name, place in sorted(places.items(), key=lambda item: item[1].start):
        if place.start < end:
            raise ValueError(f"{show(name)} lies over another tensor")
        end = place.start + place.size
    if end > len(content):
        raise ValueError(f"tensors up to byte {end:,} of {len(content):,}")
    return Header(values, places)


def _place(
    name: str,
    shape: tuple[int, ...],
    kind: int,
    offset: int,
    begin: int,
    formats: Mapping[int, tuple[int, int]],
) -> Place:
    if kind not in formats:
        raise ValueError(f"{show(name)} in the unknown format {kind:,}")
    block, size = formats[kind]
    if min(shape) < 1 or prod(shape) > LARGEST_INT:
        raise ValueError(f"{show(name)} of shape {shape}")
    if shape[-1] % block:
        raise ValueError(f"{show(name)} with rows of {shape[-1]:,} numbers, no multiple of {block}")
    return Place(shape, kind, begin + offset, prod(shape) // block * size)


class _Cursor:
    """Reads the values of a header from its beginning."""

    def __init__(self, head: memoryview) -> None:
        self._head = head
        self.at = 0

    def take(self, count: int) -> memoryview:
        if count > len(self._head) - self.at:
            raise ValueError(f"{count:,} bytes at byte {self.at:,} of a head of {len(self._head):,}")
        self.at += count
        return self._head[self.at - count : self.at]

    def whole(self, code: str) -> int:
        return int.from_bytes(self.take(int(code[1])), "little", signed=code[0] == "i")

    def text(self) -> str:
        start = self.at
        try:
            return str(self.take(self.whole("u8")), "utf-8")
        except UnicodeDecodeError:
            raise ValueError(f"text that is not UTF-8 at byte {start:,}") from None

    def value(self, kind: int) -> Value:
        if kind == _TEXT:
            return self.text()
        if kind == _BOOL:
            return self.whole("u1") != 0
        if kind == _LIST:
            return self._list(self.whole("u4"), self.whole("u8"))
        code = _code(kind)
        if code[0] == "f":
            number: float = struct.unpack("<f" if code == "f4" else "<d", self.take(int(code[1])))[0]
            return number
        return self.whole(code)

    def _list(self, kind: int, count: int) -> list[str] | np.ndarray:
        if kind == _TEXT:
            # Each text takes at least the 8 bytes of its length.
            if count > min(MOST_TEXTS, (len(self._head) - self.at) // 8):
                raise ValueError(f"a list of {count:,} texts at byte {self.at:,}")
            return [self.text() for _ in range(count)]
        code = "u1" if kind == _BOOL else _code(kind)
        return np.frombuffer(self.take(count * int(code[1])), f"<{code}").copy()


def _code(kind: int) -> str:
    if kind not in _NUMBERS:
        raise ValueError("a list of lists" if kind == _LIST else f"a value of the unknown type {kind:,}")
    return _NUMBERS[kind]


class Metadata:
    """The metadata of a file. The getters return None for a missing key, and raise CheckpointError that names
    file and key for a value of another type."""

    def __init__(self, path: Path, values: Mapping[str, Value]) -> None:
        self._path, self._values = path, values

    def __contains__(self, key: str) -> bool:
        return key in self._values

    def text(self, key: str) -> str | None:
        value = self._values.get(key)
        return value if value is None or isinstance(value, str) else self._refuse(key, "text")

    def whole(self, key: str) -> int | None:
        value = self._values.get(key)
        is_whole = isinstance(value, int) and not isinstance(value, bool) and value <= LARGEST_INT
        return value if value is None or is_whole else self._refuse(key, "a whole number")  # type: ignore[return-value]

    def number(self, key: str) -> float | None:
        value = self._values.get(key)
        if value is None:
            return None
        if isinstance(value, bool) or not isinstance(value, int | float) or not math.isfinite(value):
            self._refuse(key, "a number")
        return value

    def flag(self, key: str) -> bool | None:
        value = self._values.get(key)
        return value if value is None or isinstance(value, bool) else self._refuse(key, "true or false")

    def texts(self, key: str) -> list[str] | None:
        value = self._values.get(key)
        return value if value is None or isinstance(value, list) else self._refuse(key, "a list of texts")

    def numbers(self, key: str, count: int, *, whole: bool = False) -> list[Any] | None:
        """Return a list of `count` finite numbers, or integers if `whole`."""
        value = self._values.get(key)
        if value is None:
            return None
        fits = isinstance(value, np.ndarray) and len(value) == count and bool(np.isfinite(value).all())
        if not fits or (whole and value.dtype.kind not in "iu"):  # type: ignore[union-attr]
            self._refuse(key, f"a list of {count:,} {'whole ' if whole else ''}numbers")
        return list(value.tolist())  # type: ignore[union-attr]

    def shown(self, key: str) -> str:
        """Return the value as shown in messages."""
        value = self._values.get(key)
        return f"a list of {len(value):,} numbers" if isinstance(value, np.ndarray) else show(value)

    def _refuse(self, key: str, allowed: str) -> NoReturn:
        raise CheckpointError(Problem(f"{self._path}: {key}", self.shown(key), allowed))
