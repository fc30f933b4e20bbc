"""Read and check manifest.json of a checkpoint."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from math import prod
from pathlib import Path
from typing import Any, Literal

from llmtrain.checkpoint.names import MANIFEST
from llmtrain.config import require, show
from llmtrain.data.mixture import Segment, timeline_problems
from llmtrain.errors import CheckpointError, Problem
from llmtrain.files import checksum_of_json, is_inside_path
from llmtrain.models.huggingface.origin import Origin
from llmtrain.objectives.older import with_objective
from llmtrain.reading import decode_file, parse_object, read_bytes

FORMAT = "llmtrain-checkpoint"
VERSION = 3
"""Version 3 moved the objective out of the model section and lists frozen parameters."""
READABLE = (2, VERSION)
MANIFEST_BYTES = 256 << 20
MANIFEST_VALUES = 10_000_000
"""Enough for a million boxes, such as a thousand ranks and a model with three hundred weights."""
WEIGHT = "weight"
OPTIMIZER = "optimizer."
"""Prefix of kinds of optimizer state, such as `optimizer.exp_avg`."""
BYTES_PER_ELEMENT = 4
_XXH3 = re.compile(r"[0-9a-f]{32}")
_RUN_ID = re.compile(r"[\w-]{1,128}", re.ASCII)


def step_folder(step: int) -> str:
    return f"step-{step:08d}"


@dataclass(frozen=True)
class _File:
    file: str
    bytes: int
    xxh3_128: str

    def problems(self) -> Iterator[Problem]:
        allowed = "a file of the checkpoint's own folder"
        yield from require(is_inside_path(self.file), "file", self.file, allowed)
        yield from require(self.bytes >= 0, "bytes", self.bytes, "0 or more")
        yield from require(bool(_XXH3.fullmatch(self.xxh3_128)), "xxh3_128", self.xxh3_128, "32 hex digits")


@dataclass(frozen=True)
class _Position:
    step: int = 0


@dataclass(frozen=True)
class _Optimizer:
    name: str


@dataclass(frozen=True)
class _Batch:
    sequence_length: int


@dataclass(frozen=True)
class _Train:
    steps: int


@dataclass(frozen=True)
class _Run:
    optimizer: _Optimizer
    train: _Train
    precision: str
    batch: _Batch | None = None


@dataclass(frozen=True)
class _Layout:
    world_size: int
    data: int
    tensor: int
    pipeline: int
    sequence: int
    zero: int
    global_size: int


@dataclass(frozen=True)
class _Data:
    tokenizer_sha256: str | None = None


@dataclass(frozen=True)
class _Tracker:
    run_id: str | None = None

    def problems(self) -> Iterator[Problem]:
        is_id = self.run_id is None or bool(_RUN_ID.fullmatch(self.run_id))
        yield from require(is_id, "run_id", self.run_id, "letters, digits, - and _")


@dataclass(frozen=True)
class _Starting:
    """Differences between a model and the folder that it started from."""

    new: tuple[str, ...] = ()
    """Parameters that the folder lacked."""
    unused: tuple[str, ...] = ()
    """Weights of the folder that the model did not use."""


@dataclass(frozen=True)
class Base:
    """The folder whose weights a checkpoint leaves out, since no training changed them."""

    path: str
    """Absolute."""
    digest: str
    """Of its weights; see interchange/base.py."""
    relative: str = ""
    """The path from the checkpoint's folder, for folders that are moved together."""


@dataclass(frozen=True)
class _Evaluations:
    """One figure at the evaluations of a run so far."""

    metric: str
    steps: tuple[int, ...] = ()
    values: tuple[float | None, ...] = ()
    best_figures: Mapping[str, float | None] = field(default_factory=dict)

    def problems(self) -> Iterator[Problem]:
        allowed = f"{len(self.steps)}, as many as steps"
        yield from require(len(self.values) == len(self.steps), "values", len(self.values), allowed)


@dataclass(frozen=True)
class _Spikes:
    """Recent losses and norms of a run, and its counts of bad steps and rollbacks; see train/spikes.py."""

    losses: tuple[float, ...] = ()
    norms: tuple[float, ...] = ()
    in_a_row: int = 0
    rollbacks: int = 0


@dataclass(frozen=True)
class _Manifest:
    """All fields but the tensors, which may have a million boxes. Fields with a default may be missing."""

    step: int
    files: tuple[_File, ...]
    scaler: Mapping[str, float]
    counters: Mapping[str, Mapping[str, float]]
    saved_at: str = ""
    position: _Position = _Position()
    model: Mapping[str, Any] = field(default_factory=lambda: {"family": ""})
    """The encoded model config."""
    data: _Data | None = None
    config: _Run | None = None
    layout: _Layout | None = None
    timeline: tuple[Segment, ...] | None = None
    validation_loss: Any = None
    """A number, which may be infinite; null: not measured."""
    evaluation_owed: bool = False
    validation: Mapping[str, float | None] | None = None
    """Figures of the evaluation at this step; null: none was made, or the checkpoint is older than this."""
    evaluations: _Evaluations | None = None
    spikes: _Spikes | None = None
    trackers: Mapping[str, _Tracker] | None = None
    origin: Origin | None = None
    fresh: tuple[str, ...] = ()
    """Parameters that have not been trained at all."""
    frozen: tuple[str, ...] = ()
    """Parameters that were not trained in this run."""
    left_out: tuple[str, ...] = ()
    dtype: Literal["float32", "float64", "float16", "bfloat16"] = "float32"
    imported_from: str | None = None
    started_from: str | None = None
    starting: _Starting | None = None
    base: Base | None = None

    def problems(self) -> Iterator[Problem]:
        family = self.model.get("family")
        yield from require(isinstance(family, str), "model.family", family, "text")
        for name, number in (("step", self.step), ("position.step", self.position.step)):
            yield from require(number >= 0, name, number, "0 or more")
        yield from require(
            self.validation_loss is None or type(self.validation_loss) in (int, float),
            "validation_loss",
            self.validation_loss,
            "a number, or null",
        )
        if self.timeline is not None:
            yield from timeline_problems(self.timeline)


def read_manifest(folder: Path) -> dict[str, Any]:
    """Return the manifest of `folder`, with the type of each field and the files of each tensor checked.

    Raise CheckpointError, which names the field, unless it is a valid manifest of a supported version.
    """
    where = str(folder / MANIFEST)
    try:
        manifest = parse_object(read_bytes(folder / MANIFEST, MANIFEST_BYTES), most=MANIFEST_VALUES)
    except FileNotFoundError:
        raise CheckpointError(Problem(str(folder), "no manifest.json", "a checkpoint folder")) from None
    except (OSError, ValueError) as error:
        reason = error.strerror if isinstance(error, OSError) else error
        raise CheckpointError(Problem(where, f"an unreadable manifest ({reason})")) from None
    if manifest.get("format") != FORMAT:
        raise CheckpointError(Problem(where, "another kind of file", FORMAT))
    if type(manifest.get("version")) is not int or manifest["version"] not in READABLE:
        version, remedy = show(manifest.get("version")), "use the version of llmtrain that wrote it"
        raise CheckpointError(
            Problem(str(folder), f"version {version}", " or ".join(map(str, READABLE)), remedy)
        )
    is_renamed = folder.name.startswith("step-") and folder.name != _folder_of(manifest.get("step"))
    if manifest.get("checksum") != checksum_of_json(manifest) or is_renamed:
        remedy = "name another step's folder"
        raise CheckpointError(Problem(where, "an altered manifest", "the manifest as it was written", remedy))
    decode_file(_Manifest, manifest, where, CheckpointError)
    if found := _tensor_problem(manifest):
        raise CheckpointError(Problem(f"{where}: {found.where}", found.got, found.allowed))
    return {**with_objective(manifest), "version": VERSION}


def _folder_of(step: Any) -> str | None:
    return step_folder(step) if type(step) is int else None


def _tensor_problem(manifest: Mapping[str, Any]) -> Problem | None:
    """Return the first reason why `tensors` is not a mapping kind → name → shape and boxes, in listed
    files that are large enough; None if it is."""
    sizes = {entry["file"]: entry["bytes"] for entry in manifest["files"]}
    needed = dict.fromkeys(sizes, 0)
    kinds = manifest.get("tensors")
    if not isinstance(kinds, dict) or not kinds.get(WEIGHT):
        return Problem("tensors", show(kinds), f"a section of keys, {WEIGHT} among them")
    for kind, entries in kinds.items():
        if not isinstance(entries, dict):
            return Problem(f"tensors.{kind}", show(entries), "a section of keys")
        for name, entry in entries.items():
            where = f"tensors.{kind}.{name}"
            if not isinstance(entry, dict) or not _are_sizes(entry.get("shape")):
                return Problem(where, show(entry), "a shape and boxes")
            boxes, covered = entry.get("boxes"), 0
            if not isinstance(boxes, list) or not all(map(_is_box, boxes)):
                odd = next((b for b in boxes if not _is_box(b)), None) if isinstance(boxes, list) else boxes
                return Problem(f"{where}.boxes", show(odd), "a list of [file, key, [four sizes]]")
            for file, _, (_, _, rows, columns) in boxes:
                if file not in needed:
                    allowed = "files that are listed with a checksum"
                    return Problem(f"{where}.boxes", f"the file {file!r}", allowed)
                needed[file] += BYTES_PER_ELEMENT * rows * columns
                covered += rows * columns
            if covered != (numel := prod(entry["shape"])):
                got = f"{covered:,} elements in boxes"
                return Problem(where, got, f"{numel:,}, as its shape {entry['shape']} has")
    for name in () if manifest.get("base") is not None else manifest.get("frozen", ()):
        if name not in kinds[WEIGHT]:
            return Problem("frozen", show(name), "names of weights")
    for file, size in needed.items():
        if size > sizes[file]:
            return Problem("tensors", f"{size:,} bytes in {file}", f"{sizes[file]:,}, as many as it has")
    return None


def _is_box(box: Any) -> bool:
    return (
        type(box) is list
        and len(box) == 3
        and type(box[0]) is str
        and type(box[1]) is str
        and _are_sizes(box[2])
        and len(box[2]) == 4
    )


def _are_sizes(numbers: Any) -> bool:
    return type(numbers) is list and all(type(n) is int and 0 <= n < 2**62 for n in numbers)
