"""Read any box of any parameter of a checkpoint, or restore it into an engine of any layout."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from functools import cached_property, lru_cache
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors import SafetensorError

from llmtrain import files
from llmtrain.checkpoint.cover import cover_problem
from llmtrain.checkpoint.manifest import MANIFEST, OPTIMIZER, WEIGHT, read_manifest
from llmtrain.engine.base import Engine, optimizer_slot, set_optimizer_counter
from llmtrain.engine.carried import CARRIED, carried_by
from llmtrain.errors import CheckpointError, Problem, nearest
from llmtrain.safetensors_files import open_safetensors
from llmtrain.tensor_boxes import Box, Shard, matrix_shape, whole
from llmtrain.tokenizers.base import TOKENIZER_FILES

MAX_OPEN_FILES = 256
KEPT_TABLES = 16


class Reader:
    """Reads boxes of a checkpoint's tensors. It keeps files open for many small reads, so make one for
    each task; they are closed when it is deleted."""

    def __init__(self, checkpoint: Checkpoint) -> None:
        self._checkpoint = checkpoint
        # Functions of the module: caching a method would keep this object alive.
        self._file = lru_cache(maxsize=MAX_OPEN_FILES)(lambda file: open_safetensors(checkpoint.local(file)))
        self._boxes_N4 = lru_cache(maxsize=KEPT_TABLES)(lambda kind, name: _table(checkpoint, kind, name))

    def read(self, kind: str, name: str, box: Box) -> torch.Tensor:
        """Return (rows, columns) fp32 of the parameter as a matrix.

        Raise CheckpointError if the tensor or a part of it is missing, or a file is unreadable.
        """
        out = torch.empty(box.rows, box.columns)
        self._fill(out, kind, name, box)
        return out

    def read_into(self, out: torch.Tensor, kind: str, name: str, shard: Shard, start: int) -> None:
        """Fill `out` (1-D, any device and dtype) with elements [start, start + len(out)) of the flattened
        `shard`; padding becomes 0. Raise CheckpointError as `read` does, and if the shape differs."""
        if kind == WEIGHT and name in self._checkpoint.left_out:
            read_part(self._checkpoint.of_base(name), out, name, shard, start)
            return
        entry = self._checkpoint.entry(kind, name)
        if tuple(entry["shape"]) != shard.shape:
            path, theirs = self._checkpoint.path, tuple(entry["shape"])
            raise CheckpointError(Problem(f"{path}: {name}", f"shape {theirs}", f"shape {shard.shape}"))
        with torch.no_grad():
            if shard.is_padded:
                out.zero_()
            for box, place in shard.pieces(start, start + out.numel()):
                self._fill(out[place].view(box.rows, box.columns), kind, name, box)

    def _fill(self, out: torch.Tensor, kind: str, name: str, box: Box) -> None:
        """Fill `out` (rows, columns) from all stored boxes that intersect `box`."""
        stored = self._checkpoint.entry(kind, name)["boxes"]
        boxes_N4 = self._boxes_N4(kind, name)
        begin_N2, end_N2 = boxes_N4[:, :2], boxes_N4[:, :2] + boxes_N4[:, 2:]
        wanted_end = box.row + box.rows, box.column + box.columns
        meets_N = ((begin_N2 < wanted_end) & (end_N2 > box[:2])).all(axis=1)
        missing = box.numel
        for i in np.flatnonzero(meets_N).tolist():
            file, key, place = stored[i]
            there = Box(*place)
            common = there.intersection(box)
            assert common is not None
            out[_slices(common, box)] = self._get(file, key, there)[_slices(common, there)]
            missing -= common.numel
        if missing:
            path = self._checkpoint.path
            raise CheckpointError(
                Problem(
                    f"{path}: {kind} {name}",
                    f"boxes that lack {missing:,} of {box.numel:,} elements or hold them twice",
                    "every element once",
                )
            )

    def _get(self, file: str, key: str, box: Box) -> Any:
        """Return a slice of the stored box. Raise CheckpointError if the file holds another shape or
        dtype."""
        try:
            found = self._file(file).get_slice(key)
            shape, dtype = found.get_shape(), found.get_dtype()
        except SafetensorError as error:
            path = str(self._checkpoint.path / file)
            raise CheckpointError(Problem(path, f"a file that does not hold {key} ({error})")) from error
        if (shape, dtype) != ([box.rows, box.columns], "F32"):
            where, got = str(self._checkpoint.path / file), f"{key} as {dtype} {shape}"
            raise CheckpointError(Problem(where, got, f"F32 {[box.rows, box.columns]}"))
        return found

    def header_problem(self, kind: str, name: str) -> str | None:
        """Return the first difference between the files' tensors and the manifest, or None."""
        for file, key, box in self._checkpoint.entry(kind, name)["boxes"]:
            try:
                self._get(file, key, Box(*box))
            except CheckpointError as error:
                problem = error.problems[0]
                return f"{file}: {problem.got}" + (f", not {problem.allowed}" if problem.allowed else "")
        return None


def cover_problem_of(entry: Mapping[str, Any]) -> str | None:
    """Return the first reason why the boxes of a tensor don't cover it exactly once, or None."""
    return cover_problem(whole(tuple(entry["shape"])), [Box(*box) for _, _, box in entry["boxes"]])


def _table(checkpoint: Checkpoint, kind: str, name: str) -> np.ndarray:
    """Return all boxes of one tensor: row, column, rows, columns."""
    boxes = [box for _, _, box in checkpoint.entry(kind, name)["boxes"]]
    return np.array(boxes, dtype=np.int64).reshape(-1, 4)


def _slices(box: Box, within: Box) -> tuple[slice, slice]:
    """Return the slices of `box` in the matrix of `within`."""
    row, column = box.row - within.row, box.column - within.column
    return slice(row, row + box.rows), slice(column, column + box.columns)


def read_part(weight: torch.Tensor, out: torch.Tensor, name: str, shard: Shard, start: int) -> None:
    """Fill `out` (1-D) with elements [start, start + len(out)) of the flattened `shard` of a whole weight, as
    Reader.read_into does."""
    if tuple(weight.shape) != shard.shape:
        raise CheckpointError(Problem(name, f"shape {tuple(weight.shape)}", f"shape {shard.shape}"))
    matrix = weight.reshape(matrix_shape(shard.shape))
    with torch.no_grad():
        if shard.is_padded:
            out.zero_()
        for box, place in shard.pieces(start, start + out.numel()):
            part = matrix[box.row : box.row + box.rows, box.column : box.column + box.columns]
            out[place] = part.reshape(-1).to(out.device, out.dtype)


class Weights(Mapping[str, torch.Tensor]):
    """Canonical name → whole fp32 weight, read on access and not kept."""

    def __init__(self, checkpoint: Checkpoint) -> None:
        self._checkpoint = checkpoint
        self._entries = checkpoint.manifest["tensors"][WEIGHT]
        self._reader = Reader(checkpoint)

    def __getitem__(self, name: str) -> torch.Tensor:
        if name in self._checkpoint.left_out:
            return self._checkpoint.of_base(name).float()
        shape = tuple(self._entries[name]["shape"])
        return self._reader.read(WEIGHT, name, whole(shape)).view(shape)

    def __iter__(self) -> Iterator[str]:
        return iter((*self._entries, *sorted(self._checkpoint.left_out)))

    def __len__(self) -> int:
        return len(self._entries) + len(self._checkpoint.left_out)

    def read_into(self, out: torch.Tensor, name: str, shard: Shard, start: int) -> None:
        """Read a part of a weight, as Reader.read_into does."""
        self._reader.read_into(out, WEIGHT, name, shard, start)


@dataclass(frozen=True)
class Checkpoint:
    """A committed checkpoint, open for reading."""

    path: Path
    manifest: dict[str, Any]
    base: Mapping[str, torch.Tensor] | None = None
    """The weights that it left out, which interchange/base.py opens; None: not opened."""
    fetch: Callable[[Path], None] | None = None
    """Gets a file of it that this host lacks; None: all files are here."""

    @classmethod
    def open(cls, path: Path) -> Checkpoint:
        """Open a checkpoint and read its manifest. Raise CheckpointError as read_manifest does."""
        return cls(path, read_manifest(path))

    @property
    def step(self) -> int:
        return int(self.manifest["step"])

    def local(self, file: str) -> Path:
        """Return the path of one of its files, which is fetched if this host lacks it."""
        path = self.path / file
        if self.fetch is not None and not path.exists():
            self.fetch(path)
        return path

    @property
    def is_imported(self) -> bool:
        """Return whether it holds imported weights, without optimizer state or a run."""
        return "imported_from" in self.manifest

    @property
    def frozen(self) -> frozenset[str]:
        """Return the names of the parameters that were not trained."""
        return frozenset(self.manifest.get("frozen", ()))

    @property
    def statistics(self) -> frozenset[str]:
        """Return the names of the weights that forward passes change, and no optimizer."""
        return frozenset(self.manifest.get("statistics", ()))

    @cached_property
    def left_out(self) -> frozenset[str]:
        """Return the names of the weights that it does not hold, which are those of its base."""
        return self.frozen - self.manifest["tensors"][WEIGHT].keys()

    @property
    def weight_names(self) -> frozenset[str]:
        """Return the names of all weights of the model."""
        return self.left_out | self.manifest["tensors"][WEIGHT].keys()

    def of_base(self, name: str) -> torch.Tensor:
        """Return a whole weight that it left out, as the base holds it. Raise CheckpointError if it was not
        opened, or lacks it."""
        if self.base is None or name not in self.base:
            where = f"{self.path}: base {self.manifest['base']['path']}"
            raise CheckpointError(Problem(where, f"no {name}", "the weights that it was trained over"))
        return self.base[name]

    @property
    def updates(self) -> Mapping[str, float]:
        """Return the optimizer steps that each parameter has had, where the optimizer counts them."""
        counted: Mapping[str, float] = self.manifest["counters"].get(f"{OPTIMIZER}step", {})
        return counted

    @property
    def bytes(self) -> int:
        """Return the size of its files, without the manifest."""
        return sum(entry["bytes"] for entry in self.manifest["files"])

    @property
    def tokenizer(self) -> Path | None:
        """Return its tokenizer file, for `load_tokenizer`."""
        paths = [self.path / name for name in TOKENIZER_FILES]
        return next((path for path in paths if path.exists()), None)

    def require(self, *sections: str) -> None:
        """Raise CheckpointError if the manifest lacks one of these sections."""
        if missing := [name for name in sections if self.manifest.get(name) is None]:
            where = f"{self.path / MANIFEST}: {missing[0]}"
            raise CheckpointError(Problem(where, "nothing", "a section of keys"))

    def entry(self, kind: str, name: str) -> dict[str, Any]:
        """Return shape and boxes of one tensor. Raise CheckpointError if it is missing."""
        held = self.manifest["tensors"].get(kind, {})
        if name not in held:
            allowed = nearest(name, held) if held else nearest(kind, self.manifest["tensors"])
            raise CheckpointError(Problem(str(self.path), f"no {kind} {name}", allowed))
        return held[name]

    def damage(self, part: int = 0, parts: int = 1) -> str | None:
        """Return the first file whose size or checksum is wrong, described, or None. Part `part` of
        `parts` checks every parts-th file, so that ranks share the work."""
        for entry in self.manifest["files"][part::parts]:
            path = self.path / entry["file"]
            try:
                size = path.stat().st_size
                if size != entry["bytes"]:
                    return f"{entry['file']} has {size:,} bytes, not {entry['bytes']:,}"
                if files.checksum(path) != entry["xxh3_128"]:
                    return f"{entry['file']} has another checksum than when it was written"
            except FileNotFoundError:
                return f"{entry['file']} is missing"
            except OSError as error:
                return f"{entry['file']} cannot be read ({error.strerror})"
        return None

    def incompleteness(self) -> str | None:
        """Return the first tensor whose boxes don't cover it exactly once, or whose files differ from the
        manifest, described, or None. Reads no values."""
        reader = Reader(self)
        for kind, entries in self.manifest["tensors"].items():
            for name, entry in entries.items():
                if flaw := cover_problem_of(entry) or reader.header_problem(kind, name):
                    return f"{kind} {name}: {flaw}"
        return None

    def read(self, kind: str, name: str, box: Box) -> torch.Tensor:
        """Read one box, as Reader.read does."""
        return Reader(self).read(kind, name, box)

    def read_into(self, out: torch.Tensor, kind: str, name: str, shard: Shard, start: int) -> None:
        """Read one part, as Reader.read_into does; for several make a Reader."""
        Reader(self).read_into(out, kind, name, shard, start)

    def weights(self) -> Weights:
        """Return all weights in fp32 by canonical name, each read on access."""
        return Weights(self)

    def restore(self, engine: Engine) -> None:
        """Restore weights, optimizer state and loss scaler into an engine of any layout."""
        reader = Reader(self)
        kinds = [kind for kind in self.manifest["tensors"] if kind.startswith(OPTIMIZER)]
        for fragment in engine.held_fragments():
            place = fragment.name, fragment.shard, fragment.start
            reader.read_into(fragment.view_of(fragment.holder), WEIGHT, *place)
            if not fragment.trains:
                continue
            for kind in kinds:
                if fragment.name in self.manifest["tensors"][kind]:
                    slot = optimizer_slot(engine.optimizer, fragment, kind.removeprefix(OPTIMIZER))
                    reader.read_into(slot, kind, *place)
            for kind, values in self.manifest["counters"].items():
                if fragment.name in values:
                    key = kind.removeprefix(OPTIMIZER)
                    set_optimizer_counter(engine.optimizer, fragment, key, values[fragment.name])
        engine.refresh_weights()
        engine.load_scaler_state(self.manifest["scaler"])
        states = carried_by(engine.model)
        shape = [] if states is None else [states.rows, states.width + 2]
        # Rows of a step of another size stand elsewhere in the corpus: they begin from zeros.
        if (
            states is not None
            and self.manifest["tensors"].get(CARRIED, {CARRIED: {}})[CARRIED].get("shape") == shape
        ):
            states.unpack(reader.read(CARRIED, CARRIED, whole(tuple(shape))))
