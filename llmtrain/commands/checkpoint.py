"""`llmtrain checkpoint VERB PATH`: verify, show, compare and delete checkpoints, without a GPU.

PATH is a checkpoint folder, or a run folder or its checkpoints/, which stands for the newest good checkpoint,
or for all of them with verify and prune. At most one tensor, or a band of its rows, is held in memory.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from llmtrain.config import decode, require
from llmtrain.errors import CheckpointError, Problem, printable
from llmtrain.standard_streams import print_note
from llmtrain.tensor_boxes import Box, matrix_shape

if TYPE_CHECKING:
    from llmtrain.checkpoint.reader import Checkpoint, Reader

DIFFERENT = 1
"""Exit code of `diff` for a difference, as of diff(1)."""
BAND_ELEMENTS = 2**24
"""Number of elements that `diff` compares at once."""


# verify


@dataclass(frozen=True)
class VerifyConfig:
    path: Path
    """A run folder, which stands for all its checkpoints, or a checkpoint folder."""


def verify(mapping: Mapping[str, Any]) -> None:
    """Print a line for each checkpoint. Raise CheckpointError with the damage of all of them."""
    from llmtrain.checkpoint.reader import Checkpoint
    from llmtrain.interchange.trained import config_of
    from llmtrain.vectors.config import vectors_config_type

    config = decode(VerifyConfig, mapping)
    problems: list[Problem] = []
    for path in _step_folders(config.path):
        try:
            checkpoint = Checkpoint.open(path)
            flaw = checkpoint.damage() or checkpoint.incompleteness()
            if "model" in checkpoint.manifest and vectors_config_type(checkpoint.manifest["model"]) is None:
                config_of(checkpoint)
            found = [Problem(str(path), f"a damaged checkpoint ({flaw})")] if flaw else []
        except CheckpointError as error:
            found = list(error.problems)
        problems += found
        print(
            f"{path.name}  {'damaged' if found else 'good'}{_size(checkpoint) if not found else ''}",
            flush=True,
        )
    if problems:
        raise CheckpointError(problems)


def _size(checkpoint: Checkpoint) -> str:
    num_files = len(checkpoint.manifest["files"])
    num_tensors = sum(map(len, checkpoint.manifest["tensors"].values()))
    return f"  {num_tensors} tensors in {num_files} files, {checkpoint.bytes:,} bytes"


# show


@dataclass(frozen=True)
class ShowConfig:
    path: Path
    """A run folder, which stands for its newest good checkpoint, or a checkpoint folder."""
    tensors: bool = True
    """Also print a line for each tensor."""


def show(mapping: Mapping[str, Any]) -> None:
    """Print the facts of a checkpoint from its manifest."""
    from llmtrain.checkpoint.manifest import MANIFEST, WEIGHT
    from llmtrain.checkpoint.reader import Checkpoint
    from llmtrain.checkpoint.retention import find

    config = decode(ShowConfig, mapping)
    is_one = (config.path / MANIFEST).exists()
    checkpoint = Checkpoint.open(config.path) if is_one else find(config.path, print_note)
    run = () if checkpoint.is_imported else ("config", "layout", "position")
    checkpoint.require("saved_at", "model", *run)
    manifest = checkpoint.manifest
    entries: dict[str, dict[str, Any]] = manifest["tensors"]
    num_parameters = sum(math.prod(entry["shape"]) for entry in entries[WEIGHT].values())
    facts = {
        "checkpoint": checkpoint.path,
        "step": f"0, imported from {manifest['imported_from']}"
        if checkpoint.is_imported
        else _progress(manifest),
        "saved": manifest["saved_at"],
        "model": f"{manifest['model']['family']}, {num_parameters:,} parameters",
        **(_facts_of_import(manifest) if checkpoint.is_imported else _facts_of_run(manifest)),
        "files": f"{len(manifest['files'])}, {checkpoint.bytes:,} bytes",
    }
    for name, fact in facts.items():
        print(f"{name:<12}{printable(str(fact))}")
    if config.tensors:
        _print_tensors(entries)


def _facts_of_import(manifest: Mapping[str, Any]) -> dict[str, str]:
    lists = {"begun anew": manifest.get("fresh"), "left out": manifest.get("left_out")}
    return {name: ", ".join(names) for name, names in lists.items() if names}


def _progress(manifest: Mapping[str, Any]) -> str:
    from llmtrain.data.mixture import Timeline

    step, steps = manifest["position"]["step"], manifest["config"]["train"]["steps"]
    samples = step * manifest["layout"]["global_size"]
    if manifest.get("timeline") is not None:  # earlier batches may have had another size
        samples = Timeline.decode(manifest["timeline"]).samples(step).start
    return f"{step:,} of {steps:,}, {samples:,} samples"


def _facts_of_run(manifest: Mapping[str, Any]) -> dict[str, str]:
    run, layout = manifest["config"], manifest["layout"]
    axes = ("data", "tensor", "pipeline", "sequence")
    loss = manifest.get("validation_loss")
    return {
        "optimizer": run["optimizer"]["name"],
        "layout": f"world_size {layout['world_size']} = "
        + " · ".join(f"{axis} {layout[axis]}" for axis in axes)
        + f"; ZeRO {layout['zero']}",
        "precision": run["precision"],
        "validation": "not evaluated at this step" if loss is None else f"loss {loss:.4f}{_others(manifest)}",
        **_facts_of_training(manifest),
    }


def _others(manifest: Mapping[str, Any]) -> str:
    """Return the other figures of the evaluation at a checkpoint's step."""
    figures = (manifest.get("validation") or {}).items()
    return "".join(f", {name} {value:.4f}" for name, value in figures if name != "loss" and value is not None)


def _facts_of_training(manifest: Mapping[str, Any]) -> dict[str, str]:
    """Return the frozen and the never trained parameters, and how the model differed from its source."""
    from llmtrain.checkpoint.manifest import WEIGHT

    entries = manifest["tensors"][WEIGHT]
    frozen, fresh = manifest.get("frozen", ()), manifest.get("fresh", ())
    held = [math.prod(entries[name]["shape"]) for name in frozen if name in entries]
    left_out = len(frozen) - len(held)
    facts = {
        "frozen": f"{len(frozen):,} of {len(entries) + left_out:,} parameters, "
        + (f"{left_out:,} of them in the base" if left_out else f"{sum(held):,} numbers")
        if frozen
        else "",
        "base": manifest["base"]["path"] if manifest.get("base") else "",
        "untrained": ", ".join(fresh),
        **{which: ", ".join(names) for which, names in (manifest.get("starting") or {}).items()},
    }
    return {name: fact for name, fact in facts.items() if fact}


def _print_tensors(entries: Mapping[str, Mapping[str, Any]]) -> None:
    """Print the name, the shape and the kinds of state of each tensor."""
    kinds: dict[tuple[str, tuple[int, ...]], list[str]] = {}
    for kind, of_kind in entries.items():
        for name, entry in of_kind.items():
            kinds.setdefault((name, tuple(entry["shape"])), []).append(kind)
    width = max((len(name) for name, _ in kinds), default=0)
    print()
    print(f"{'tensor':<{width}}  {'shape':<16}kinds")
    for (name, shape), found in kinds.items():
        print(f"{name:<{width}}  {' × '.join(map(str, shape)):<16}{', '.join(found)}")


# diff


@dataclass(frozen=True)
class DiffConfig:
    path: Path
    """A run folder, which stands for its newest good checkpoint, or a checkpoint folder."""
    other: Path
    """The checkpoint to compare it with."""
    tensors: bool = True
    """Also print a line for each tensor that differs."""


@dataclass
class Distance:
    """The difference of two tensors."""

    num_different: int = 0
    largest: float = 0.0
    """max |a − b|"""
    squares: tuple[float, float, float] = field(default=(0.0, 0.0, 0.0))
    """Sums of squares of a − b, of a and of b."""

    @property
    def relative(self) -> float:
        """|a − b| divided by the larger of |a| and |b|, as Euclidean norms."""
        apart, a, b = self.squares
        return math.sqrt(apart / max(a, b)) if self.num_different else 0.0

    def add(self, other: Distance) -> None:
        self.num_different += other.num_different
        # NaN counts as the largest.
        self.largest = max(self.largest, other.largest, key=lambda x: (math.isnan(x), x))
        self.squares = tuple(x + y for x, y in zip(self.squares, other.squares, strict=True))  # type: ignore[assignment]


def diff(mapping: Mapping[str, Any]) -> int:
    """Print how two checkpoints differ; return 0 if they are equal, else DIFFERENT."""
    from llmtrain.checkpoint.reader import Reader
    from llmtrain.checkpoint.retention import find

    config = decode(DiffConfig, mapping)
    a, b = (find(path, print_note) for path in (config.path, config.other))
    print(f"a  {a.path}\nb  {b.path}")
    told = list(_differences_of_manifests(a, b))
    for line in told:
        print(line)
    readers = Reader(a), Reader(b)
    totals: dict[str, Distance] = {}
    num_compared = num_different = 0
    theirs = _shapes(b)
    for (kind, name), shape in _shapes(a).items():
        if theirs.get((kind, name)) != shape:
            continue
        distance = _distance(readers, kind, name, tuple(shape))
        totals.setdefault(kind, Distance()).add(distance)
        num_compared += 1
        if distance.num_different:
            num_different += 1
            if config.tensors:
                print(f"{kind} {name}: {_describe(distance, math.prod(shape))}", flush=True)
    for kind, total in totals.items():
        print(f"all {kind}: {_describe(total)}")
    print(f"{num_compared} tensors compared, {num_different} differ; {len(told)} other differences")
    return DIFFERENT if told or num_different else 0


def _describe(distance: Distance, num_elements: int | None = None) -> str:
    if not distance.num_different:
        return "equal"
    of = "" if num_elements is None else f" of {num_elements:,}"
    return (
        f"max |a-b| {distance.largest:.3e}, relative {distance.relative:.3e}, "
        f"{distance.num_different:,}{of} elements differ"
    )


def _differences_of_manifests(a: Checkpoint, b: Checkpoint) -> Iterator[str]:
    """Yield a line for each tensor that one lacks or has in another shape, and for each other difference."""
    tensors = _shapes(a), _shapes(b)
    for label, ours, theirs in (("a", tensors[0], tensors[1]), ("b", tensors[1], tensors[0])):
        for kind, name in sorted(ours.keys() - theirs.keys()):
            yield f"only in {label}: {kind} {name}"
    for kind, name in sorted(tensors[0].keys() & tensors[1].keys()):
        shapes = [found[kind, name] for found in tensors]
        if shapes[0] != shapes[1]:
            yield f"another shape: {kind} {name} is {shapes[0]} in a, {shapes[1]} in b"
    counters = [
        {kind: set(of_kind.values()) for kind, of_kind in c.manifest["counters"].items()} for c in (a, b)
    ]
    for kind in sorted(counters[0].keys() | counters[1].keys()):
        values = [sorted(found.get(kind, ())) for found in counters]
        if values[0] != values[1]:
            yield f"another counter: {kind} is {values[0]} in a, {values[1]} in b"
    if a.manifest["scaler"] != b.manifest["scaler"]:
        yield f"another loss scaler: {a.manifest['scaler']} in a, {b.manifest['scaler']} in b"


def _shapes(checkpoint: Checkpoint) -> dict[tuple[str, str], list[int]]:
    """Return (kind, name) → shape."""
    kinds = checkpoint.manifest["tensors"].items()
    return {(kind, name): entry["shape"] for kind, entries in kinds for name, entry in entries.items()}


def _distance(readers: tuple[Reader, Reader], kind: str, name: str, shape: tuple[int, ...]) -> Distance:
    """Compare a tensor, one band of rows at a time."""
    rows, columns = matrix_shape(shape)
    height = max(1, BAND_ELEMENTS // columns)
    distance = Distance()
    for row in range(0, rows, height):
        box = Box(row, 0, min(height, rows - row), columns)
        a_RC, b_RC = (reader.read(kind, name, box).double() for reader in readers)
        differs_RC = (a_RC != b_RC) & ~(a_RC.isnan() & b_RC.isnan())
        apart_RC = (a_RC - b_RC).abs().where(differs_RC, 0.0)
        squares = tuple(float(x_RC.square().sum()) for x_RC in (apart_RC, a_RC, b_RC))
        distance.add(Distance(int(differs_RC.sum()), float(apart_RC.max()), squares))  # type: ignore[arg-type]
    return distance


# export


@dataclass(frozen=True)
class ExportKeys:
    """The key of `llmtrain checkpoint export` that replaces `checkpoint`."""

    path: Path


def export(mapping: Mapping[str, Any]) -> None:
    """Do the same as `llmtrain export`; the key `path` is its `checkpoint`."""
    from llmtrain.commands import export as whole

    whole.run({"checkpoint" if key == "path" else key: value for key, value in mapping.items()})


# prune


@dataclass(frozen=True)
class PruneConfig:
    path: Path
    """A run folder or its checkpoints/."""
    keep_last: int = 2
    """Number of the newest checkpoints to keep."""
    keep_best: int = 1
    """Number of checkpoints with the best validation figures to keep in addition."""
    best: str | None = None
    """Figure by which they are the best; null: that of the run."""
    keep_every: int | None = None
    """Keep the checkpoints at multiples of this many steps; null: none."""
    dry_run: bool = False
    """Only print what would be deleted."""

    def problems(self) -> Iterator[Problem]:
        from llmtrain.checkpoint.config import CheckpointConfig

        rules = {"keep_last": self.keep_last, "keep_best": self.keep_best, "keep_every": self.keep_every}
        yield from CheckpointConfig(**rules).problems()  # type: ignore[arg-type]
        yield from require(
            not self.path.name.startswith("step-"), "path", str(self.path), "a run folder or its checkpoints"
        )


def prune(mapping: Mapping[str, Any]) -> None:
    """Delete the checkpoints of a run that no rule keeps; the newest good one always stays.

    Raise CheckpointError if there is none, or while a process uses the run folder.
    """
    from llmtrain.checkpoint import retention, store
    from llmtrain.train.run_folder import RunFolder

    config = decode(PruneConfig, mapping)
    root = config.path / "checkpoints" if (config.path / "checkpoints").is_dir() else config.path
    # A running training prunes by its own rules, so it must not run now. A dry run needs no lock.
    is_run = not config.dry_run and (root.parent / ".lock").exists()
    held = RunFolder(root.parent) if is_run else None
    try:
        current = retention.find(root, print_note)
        rules = retention.Rules(config.keep_last, config.keep_best, config.keep_every, config.best)
        doomed = retention.unkept(root, current.path, rules)
        num_held, num_bytes = len(retention.list_steps(root)), 0
        for path in doomed:
            size = sum(file.stat().st_size for file in path.iterdir())
            num_bytes += size
            if not config.dry_run:
                store.remove(path)
            print(
                f"{'would delete' if config.dry_run else 'deleted'} {path.name}, {size:,} bytes", flush=True
            )
    finally:
        if held is not None:
            held.close()
    verb = "would be deleted" if config.dry_run else "deleted"
    print(f"{len(doomed)} of {num_held} checkpoints {verb}, {num_bytes:,} bytes")


def _step_folders(path: Path) -> list[Path]:
    """Return the checkpoint folder `path`, or all of a run. Raise CheckpointError if there is none."""
    from llmtrain.checkpoint.manifest import MANIFEST

    if (path / MANIFEST).exists() or path.name.startswith("step-"):
        return [path]
    root = path / "checkpoints" if (path / "checkpoints").is_dir() else path
    if found := sorted(root.glob("step-*")):
        return found
    got = "no checkpoint" if path.exists() else "no such folder"
    raise CheckpointError(Problem(str(path), got, "a run folder or a checkpoint folder (step-…)"))
