"""The weights of a Hugging Face folder: safetensors in one file, or in several with an index."""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from llmtrain.errors import CheckpointError, Problem

WEIGHTS = "model.safetensors"
INDEX = "model.safetensors.index.json"
DTYPES = {"F64": torch.float64, "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16}
"""Stored types that are taken as they are; others are codes of a quantization."""


class Stored(Mapping[str, Tensor]):
    """Stored name → tensor, on the CPU, read when asked for."""

    shapes: dict[str, tuple[int, ...]]

    def problems(self, names: Iterable[str]) -> Iterator[Problem]:
        """What is wrong with those of these names, without reading them."""
        yield from ()

    def dtypes(self, names: Iterable[str]) -> set[torch.dtype]:
        """Types of those of these names, as read."""
        return {torch.float32}

    def __iter__(self) -> Iterator[str]:
        return iter(self.shapes)

    def __len__(self) -> int:
        return len(self.shapes)


class StoredTensors(Stored):
    """Those of a folder's safetensors, from a mapping of the files into memory."""

    def __init__(self, path: Path) -> None:
        """Raises CheckpointError for files that are missing or damaged."""
        self.shapes = {}
        self._dtypes: dict[str, str] = {}
        self._files: dict[str, Any] = {}
        for name in _file_names(path):
            file = path / name
            try:
                stored = safe_open(file, framework="pt")
                for key in stored.keys():  # noqa: SIM118
                    if key.endswith(("position_ids", "token_type_ids")):
                        # Buffers of places and of zeros that older releases of transformers stored.
                        continue
                    part = stored.get_slice(key)
                    self.shapes[key], self._dtypes[key] = tuple(part.get_shape()), part.get_dtype()
                    self._files[key] = stored
            except (SafetensorError, OSError) as error:
                raise CheckpointError(
                    Problem(str(file), f"a damaged file ({error})", "safetensors", "copy it again")
                ) from error

    def problems(self, names: Iterable[str]) -> Iterator[Problem]:
        for name in names:
            if self._dtypes[name] not in DTYPES:
                yield Problem(name, f"numbers of type {self._dtypes[name]}", ", ".join(DTYPES))

    def dtypes(self, names: Iterable[str]) -> set[torch.dtype]:
        return {DTYPES[self._dtypes[name]] for name in names}

    def __getitem__(self, name: str) -> Tensor:
        tensor: Tensor = self._files[name].get_tensor(name)
        return tensor


def _file_names(path: Path) -> list[str]:
    """Of all files that hold weights; they exist. One file goes before an index, as in transformers."""
    names = [WEIGHTS]
    if (path / INDEX).exists() and not (path / WEIGHTS).exists():
        weight_map = read_json(path / INDEX).get("weight_map")
        if not isinstance(weight_map, dict) or not all(isinstance(v, str) for v in weight_map.values()):
            raise CheckpointError(Problem(str(path / INDEX), "no weight_map", "tensor name → file name"))
        names = sorted(set(weight_map.values()))
        # A file name with a path in it would lead out of the folder.
        if odd := [name for name in names if Path(name).name != name]:
            raise CheckpointError(Problem(str(path / INDEX), f"the file name {odd[0]!r}", "a bare file name"))
    for name in names:
        if not (path / name).exists():
            pickled = names == [WEIGHTS] and any(path.glob("pytorch_model*.bin"))
            got = "pickled weights only" if pickled else "no such file"
            remedy = "convert them with transformers' save_pretrained" if pickled else "download it again"
            raise CheckpointError(Problem(str(path / name), got, "safetensors", remedy))
    return names


def read_json(path: Path) -> dict[str, Any]:
    """A file's JSON object. Raises CheckpointError when it is none."""
    try:
        content = json.loads(path.read_text())
    except OSError as error:
        raise CheckpointError(
            Problem(str(path), str(error.strerror), "a Hugging Face model folder holds this file")
        ) from error
    except (ValueError, RecursionError) as error:
        raise CheckpointError(Problem(str(path), f"no JSON ({error})")) from error
    if not isinstance(content, dict):
        raise CheckpointError(Problem(str(path), f"JSON {type(content).__name__}", "an object"))
    return content
