"""Reading a checkpoint: any box of any parameter, whatever layout wrote it, and the whole into an engine."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors import SafetensorError

from llmtrain import files
from llmtrain.checkpoint.cover import cover_problem
from llmtrain.checkpoint.manifest import MANIFEST, OPTIMIZER, WEIGHT, read_manifest
from llmtrain.engine.base import Engine, optimizer_slot, set_optimizer_counter
from llmtrain.errors import CheckpointError, Problem, nearest
from llmtrain.safetensors_files import open_safetensors
from llmtrain.tensor_boxes import Box, Shard, whole
from llmtrain.tokenizers.base import TOKENIZER_FILES

MAX_OPEN_FILES = 256
KEPT_TABLES = 16


class Reader:
    """Boxes of a checkpoint's tensors. It keeps files open, which many small reads share, and so belongs to
    one piece of work; dropping it closes them."""

    def __init__(self, checkpoint: Checkpoint) -> None:
        self._checkpoint = checkpoint
        path = checkpoint.path
        # Functions of the module, since a method within its own object would keep that alive.
        self._file = lru_cache(maxsize=MAX_OPEN_FILES)(lambda file: open_safetensors(path / file))
        self._boxes_N4 = lru_cache(maxsize=KEPT_TABLES)(lambda kind, name: _table(checkpoint, kind, name))

    def read(self, kind: str, name: str, box: Box) -> torch.Tensor:
        """(rows, columns) fp32 of the matrix that the parameter is looked at as.

        Raises CheckpointError for a tensor that it lacks or that lacks elements, and for unreadable files.
        """
        out = torch.empty(box.rows, box.columns)
        self._fill(out, kind, name, box)
        return out

    def read_into(self, out: torch.Tensor, kind: str, name: str, shard: Shard, start: int) -> None:
        """Fill `out` (1-D, any device and dtype) with elements [start, start + len(out)) of the flattened
        `shard`; padding becomes 0. Raises CheckpointError as `read`, and for a parameter of another shape."""
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
        """`out` (rows, columns) from all stored boxes that have a part of `box`."""
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
        """A slice of the stored box. Raises CheckpointError where the file holds another."""
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
        """Where the files hold other tensors than the manifest says: the first problem, or None."""
        for file, key, box in self._checkpoint.entry(kind, name)["boxes"]:
            try:
                self._get(file, key, Box(*box))
            except CheckpointError as error:
                problem = error.problems[0]
                return f"{file}: {problem.got}" + (f", not {problem.allowed}" if problem.allowed else "")
        return None


def cover_problem_of(entry: Mapping[str, Any]) -> str | None:
    """What keeps the boxes of one tensor from covering it exactly once: the first problem, or None."""
    return cover_problem(whole(tuple(entry["shape"])), [Box(*box) for _, _, box in entry["boxes"]])


def _table(checkpoint: Checkpoint, kind: str, name: str) -> np.ndarray:
    """All boxes of one tensor: row, column, rows, columns."""
    boxes = [box for _, _, box in checkpoint.entry(kind, name)["boxes"]]
    return np.array(boxes, dtype=np.int64).reshape(-1, 4)


def _slices(box: Box, within: Box) -> tuple[slice, slice]:
    """Where `box` lies in the matrix that `within` is."""
    row, column = box.row - within.row, box.column - within.column
    return slice(row, row + box.rows), slice(column, column + box.columns)


class Weights(Mapping[str, torch.Tensor]):
    """Canonical name → whole fp32 weight; one is in memory at a time unless the caller keeps them."""

    def __init__(self, checkpoint: Checkpoint) -> None:
        self._entries = checkpoint.manifest["tensors"][WEIGHT]
        self._reader = Reader(checkpoint)

    def __getitem__(self, name: str) -> torch.Tensor:
        shape = tuple(self._entries[name]["shape"])
        return self._reader.read(WEIGHT, name, whole(shape)).view(shape)

    def __iter__(self) -> Iterator[str]:
        return iter(self._entries)

    def __len__(self) -> int:
        return len(self._entries)

    def read_into(self, out: torch.Tensor, name: str, shard: Shard, start: int) -> None:
        """As Reader.read_into: a part without the whole."""
        self._reader.read_into(out, WEIGHT, name, shard, start)


@dataclass(frozen=True)
class Checkpoint:
    """A committed checkpoint, open for reading."""

    path: Path
    manifest: dict[str, Any]

    @classmethod
    def open(cls, path: Path) -> Checkpoint:
        """Read the manifest. Raises CheckpointError as read_manifest."""
        return cls(path, read_manifest(path))

    @property
    def step(self) -> int:
        return int(self.manifest["step"])

    @property
    def is_imported(self) -> bool:
        """Whether it is weights from elsewhere: no optimizer's state, and no run that they came out of."""
        return "imported_from" in self.manifest

    @property
    def frozen(self) -> frozenset[str]:
        """Names of the parameters that did not train."""
        return frozenset(self.manifest.get("frozen", ()))

    @property
    def bytes(self) -> int:
        """Of its files, the manifest left out."""
        return sum(entry["bytes"] for entry in self.manifest["files"])

    @property
    def tokenizer(self) -> Path | None:
        """What `load_tokenizer` takes."""
        paths = [self.path / name for name in TOKENIZER_FILES]
        return next((path for path in paths if path.exists()), None)

    def require(self, *sections: str) -> None:
        """Raise CheckpointError for a section of the manifest that is not there."""
        if missing := [name for name in sections if self.manifest.get(name) is None]:
            where = f"{self.path / MANIFEST}: {missing[0]}"
            raise CheckpointError(Problem(where, "nothing", "a section of keys"))

    def entry(self, kind: str, name: str) -> dict[str, Any]:
        """Shape and boxes of one tensor. Raises CheckpointError when there is none."""
        held = self.manifest["tensors"].get(kind, {})
        if name not in held:
            allowed = nearest(name, held) if held else nearest(kind, self.manifest["tensors"])
            raise CheckpointError(Problem(str(self.path), f"no {kind} {name}", allowed))
        return held[name]

    def damage(self, part: int = 0, parts: int = 1) -> str | None:
        """What is wrong with its files, by size and checksum: the first problem, or None. `part` of
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
        """Which tensor its boxes don't cover exactly once, or its files don't hold as the manifest says:
        the first problem, or None. Reads no values."""
        reader = Reader(self)
        for kind, entries in self.manifest["tensors"].items():
            for name, entry in entries.items():
                if flaw := cover_problem_of(entry) or reader.header_problem(kind, name):
                    return f"{kind} {name}: {flaw}"
        return None

    def read(self, kind: str, name: str, box: Box) -> torch.Tensor:
        """One Reader.read."""
        return Reader(self).read(kind, name, box)

    def read_into(self, out: torch.Tensor, kind: str, name: str, shard: Shard, start: int) -> None:
        """One Reader.read_into; for many of them make one Reader."""
        Reader(self).read_into(out, kind, name, shard, start)

    def weights(self) -> Weights:
        """All weights, fp32, by their canonical names, each read when asked for."""
        return Weights(self)

    def restore(self, engine: Engine) -> None:
        """Put weights, optimizer state and loss scaler into the engine, whatever its layout."""
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
