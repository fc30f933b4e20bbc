"""Read the weights of a Hugging Face folder: safetensors in one file, or in several with an index."""

from __future__ import annotations

import os
from collections.abc import Iterable, Iterator, Mapping
from math import prod
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from llmtrain.config import short, show
from llmtrain.errors import CheckpointError, Problem
from llmtrain.reading import SETTINGS_BYTES, parse_object, read_bytes
from llmtrain.safetensors_files import open_safetensors

WEIGHTS = "model.safetensors"
INDEX = "model.safetensors.index.json"
DTYPES = {"F64": torch.float64, "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16}
"""Supported types; others are quantized codes."""
INDEX_BYTES = 64 << 20
"""Maximum size of the index."""
MOST_DIMS = 8
"""Maximum number of dimensions of a tensor; some functions of torch recurse over them."""
_BUFFERS = ("position_ids", "token_type_ids", "num_batches_tracked")
"""Endings of names of buffers that nothing here reads: positions, zeros, and the steps of batch norms."""


class Stored(Mapping[str, Tensor]):
    """Stored name → tensor on the CPU, read on access."""

    shapes: dict[str, tuple[int, ...]]

    def problems(self, names: Iterable[str]) -> Iterator[Problem]:
        """Yield the problems of the named tensors, without reading them."""
        yield from ()

    def dtypes(self, names: Iterable[str]) -> set[torch.dtype]:
        """Return the dtypes of the named tensors, as read."""
        return {torch.float32}

    def count(self) -> int:
        """Return the total number of elements."""
        return sum(map(prod, self.shapes.values()))

    def __iter__(self) -> Iterator[str]:
        return iter(self.shapes)

    def __len__(self) -> int:
        return len(self.shapes)


class StoredTensors(Stored):
    """The tensors of the safetensors files of a folder, memory-mapped."""

    def __init__(self, path: Path) -> None:
        """Raise CheckpointError if files are missing or damaged, contain no tensor, or differ from the index:
        of two tensors of one name it would be unclear which belongs to the model."""
        self.shapes = {}
        self._path = path
        self._dtypes: dict[str, str] = {}
        self._files: dict[str, Any] = {}
        for name, expected in _files(path).items():
            file = path / name
            stored = open_safetensors(file)
            keys = {key for key in stored.keys() if not key.endswith(_BUFFERS)}  # noqa: SIM118
            if expected is not None and keys != expected:
                raise CheckpointError(_unlike_the_index(path, name, keys, expected))
            for key in keys:
                part = stored.get_slice(key)
                self.shapes[key], self._dtypes[key] = tuple(part.get_shape()), part.get_dtype()
                self._files[key] = stored
        if not self.shapes:
            raise CheckpointError(Problem(str(path), "weights without a tensor", "a model's weights"))

    def problems(self, names: Iterable[str]) -> Iterator[Problem]:
        for name in names:
            if self._dtypes[name] not in DTYPES:
                yield Problem(short(name), f"numbers of type {self._dtypes[name]}", ", ".join(DTYPES))
            elif len(self.shapes[name]) > MOST_DIMS:
                yield Problem(short(name), f"{len(self.shapes[name]):,} dims", f"at most {MOST_DIMS}")

    def dtypes(self, names: Iterable[str]) -> set[torch.dtype]:
        return {DTYPES[self._dtypes[name]] for name in names}

    def __getitem__(self, name: str) -> Tensor:
        stored = self._files[name]
        for problem in self.problems([name]):
            raise CheckpointError(problem.within(str(self._path)))
        tensor: Tensor = stored.get_tensor(name)
        return tensor


def _files(path: Path) -> dict[str, set[str] | None]:
    """Return name of each weight file → its tensors according to the index, None without an index. A single
    file takes precedence over an index, as in transformers."""
    if not os.path.exists(path / INDEX) or os.path.exists(path / WEIGHTS):
        if not os.path.exists(path / WEIGHTS):
            pickled = any(path.glob("pytorch_model*.bin"))
            got = "pickled weights only" if pickled else "no such file"
            remedy = "convert them with transformers' save_pretrained" if pickled else "download it again"
            raise CheckpointError(Problem(str(path / WEIGHTS), got, "safetensors", remedy))
        return {WEIGHTS: None}
    weight_map = read_json(path / INDEX, INDEX_BYTES, unique=True).get("weight_map")
    where = f"{path / INDEX}: weight_map"
    if not isinstance(weight_map, dict) or not weight_map:
        raise CheckpointError(Problem(where, show(weight_map), "tensor name → file name"))
    found: dict[str, set[str] | None] = {}
    by_file: dict[str, set[str]] = {}
    for tensor, name in weight_map.items():
        # A name with a path could refer to a file outside the folder.
        if not isinstance(name, str) or not name or name in (".", "..") or {*name} & {"/", "\0"}:
            raise CheckpointError(Problem(f"{where}.{short(tensor)}", show(name), "a bare file name"))
        held = by_file.setdefault(name, set())
        if not tensor.endswith(_BUFFERS):
            held.add(tensor)
    for name in sorted(by_file):
        if not os.path.exists(path / name):
            remedy = "download it again"
            raise CheckpointError(Problem(short(str(path / name)), "no such file", "safetensors", remedy))
        found[name] = by_file[name]
    return found


def _unlike_the_index(path: Path, file: str, held: set[str], expected: set[str]) -> Iterator[Problem]:
    remedy = "the files are of different models or damaged: download them again"
    if lacking := expected - held:
        more = f" and {len(lacking) - 1:,} more" if len(lacking) > 1 else ""
        yield Problem(
            str(path / file), f"no tensor {short(min(lacking))}{more}", f"what {INDEX} puts there", remedy
        )
    if beyond := held - expected:
        more = f" and {len(beyond) - 1:,} more" if len(beyond) > 1 else ""
        got = f"the tensor {short(min(beyond))}{more}"
        yield Problem(str(path / file), got, f"only what {INDEX} puts there", remedy)


def read_json(path: Path, at_most: int = SETTINGS_BYTES, *, unique: bool = False) -> dict[str, Any]:
    """Read the JSON object in a file. Raise CheckpointError if it is not one, or has more than `at_most`
    bytes.
    unique: reject duplicate keys."""
    try:
        return parse_object(read_bytes(path, at_most), unique=unique, utf8=True)
    except OSError as error:
        problem = Problem(str(path), str(error.strerror), "a Hugging Face model folder holds this file")
    except ValueError as error:
        problem = Problem(str(path), str(error), "a JSON object")
    raise CheckpointError(problem)
