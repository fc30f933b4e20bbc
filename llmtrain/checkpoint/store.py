"""Checkpoints that know no layout: each rank writes the parts of parameters that it owns, as boxes of the
whole parameter, and whoever reads asks for any box of any parameter.

    step-00000100/
      rank-00000.safetensors   weights and optimizer state: `KIND/NAME@ROW,COLUMN`, (rows, columns) fp32
      rank-00001.safetensors
      tokenizer.model          or tokenizer.bundle.json
      manifest.json            written last: what lies where, sizes, checksums, the run's config

The folder has a temporary name until all of it is on the disk, so that a kill at any moment leaves
earlier checkpoints and no half of this one. Nothing in it is unpickled.

This module is the format: how a rank's share is written, how all become a checkpoint, how one is read.
saver.py says when; llmtrain/tensor_boxes.py what a box is.
"""

from __future__ import annotations

import dataclasses
import datetime
import os
import shutil
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from safetensors import SafetensorError, safe_open

from llmtrain import files
from llmtrain.checkpoint.cover import cover_problem
from llmtrain.checkpoint.manifest import FORMAT, MANIFEST, VERSION, WEIGHT, read_manifest, step_folder
from llmtrain.checkpoint.writer import write_safetensors
from llmtrain.distributed import processes
from llmtrain.engine.base import Engine, optimizer_slot, optimizer_tensors, set_optimizer_counter
from llmtrain.errors import CheckpointError, Problem, TrainingError, nearest
from llmtrain.tensor_boxes import Box, Shard, whole
from llmtrain.tokenizers.base import TOKENIZER_FILES

DELETED = ".deleted-"
REPLACED = ".replaced-"
OPTIMIZER = "optimizer."
"""Prefix of the kinds that are optimizer state: `optimizer.exp_avg`."""
MAX_OPEN_FILES = 256
KEPT_TABLES = 16


# Writing.


class Part(NamedTuple):
    """One kind of state of one fragment: elements [start, start + len(values)) of the flattened shard."""

    kind: str
    name: str
    shard: Shard
    start: int
    values: torch.Tensor
    """1-D, on any device."""

    def pieces(self) -> Iterator[tuple[str, Box, torch.Tensor]]:
        """(key in the file, box of the whole parameter, its values (rows, columns)); padding has none."""
        for box, place in self.shard.pieces(self.start, self.start + self.values.numel()):
            key = f"{self.kind}/{self.name}@{box.row},{box.column}"
            yield key, box, self.values[place].view(box.rows, box.columns)


@dataclass(frozen=True)
class Share:
    """What one rank has to save."""

    parts: list[Part]
    counters: dict[str, dict[str, float]]
    """Kind → parameter name → a number that all elements share (Adam's `step`)."""
    scaler: dict[str, float]


def collect(engine: Engine) -> Share:
    """This rank's share: views of the engine's own memory, which its next step changes."""
    parts: list[Part] = []
    counters: dict[str, dict[str, float]] = {}
    for fragment in engine.fragments():
        place = fragment.name, fragment.shard, fragment.start
        parts.append(Part(WEIGHT, *place, fragment.view_of(fragment.holder)))
        for key, value in optimizer_tensors(engine.optimizer, fragment):
            if isinstance(value, torch.Tensor):
                parts.append(Part(OPTIMIZER + key, *place, value))
            else:
                counters.setdefault(OPTIMIZER + key, {})[fragment.name] = value
    return Share(parts, counters, engine.scaler_state())


def begin(root: Path, step: int) -> Path:
    """Make the folder that the shares of `step` are written to; → its temporary path. All ranks call it."""
    partial = root / f".{step_folder(step)}.partial"

    def make() -> None:
        try:
            root.mkdir(parents=True, exist_ok=True)
            shutil.rmtree(partial, ignore_errors=True)
            partial.mkdir()
        except OSError as error:
            raise _failure(*why(error, partial), partial) from error

    processes.on_main(make)
    return partial


def write_share(
    folder: Path, rank: int, share: Share, go_on: Callable[[], bool] = lambda: True
) -> dict[str, Any]:
    """Write the share of `rank`, in fp32; → what was written, for the manifest. No collective in it: a
    thread may do it. For `go_on` and errors see write_safetensors."""
    pieces = [(part, *piece) for part in share.parts for piece in part.pieces()]
    path = folder / f"rank-{rank:05d}.safetensors"
    written = write_safetensors(path, [(key, values.float()) for _, key, _, values in pieces], go_on)
    files.sync_folder(folder)
    return {
        "file": {"file": path.name, "bytes": written.bytes, "xxh3_128": written.checksum},
        "places": [(part.kind, part.name, part.shard.shape, key, tuple(box)) for part, key, box, _ in pieces],
        "counters": share.counters,
        "scaler": share.scaler,
    }


def hand_in(
    partial: Path, written: dict[str, Any] | None, problem: tuple[str, str] | None
) -> list[dict[str, Any]]:
    """What each rank gives when its file is on the disk: what write_share gave, or the problem it met (see
    `why`). → all of it, in rank order, on rank 0, and nothing on others.

    Raises TrainingError on all ranks when any of them met a problem; what was written is removed then.
    """
    raise_if_any(processes.gather(problem), partial)
    return [share for share in processes.gather_to_main(written) if share is not None]


def conclude(partial: Path, step: int, problem: tuple[str, str] | None) -> Path:
    """After rank 0 has assembled the shares or met a `problem`: → the checkpoint's path, on all ranks.
    Raises as `hand_in`."""
    raise_if_any([processes.from_main(problem)], partial)
    return partial.parent / step_folder(step)


def save(
    root: Path, step: int, engine: Engine, description: Mapping[str, Any], tokenizer: Path | None
) -> Path:
    """Write the engine's state as `root/step-…`; called by all ranks, returns on all when it is on disk.

    `description` is JSON that goes into the manifest: model config, run config, tracker state, ….
    Raises TrainingError on all ranks when the disk is full; earlier checkpoints stay.
    """
    partial = begin(root, step)
    written, problem = None, None
    try:
        written = write_share(partial, processes.rank(), collect(engine))
    except Exception as error:  # told to all ranks by hand_in
        problem = why(error, partial)
    shares = hand_in(partial, written, problem)
    if processes.is_main():
        try:
            assemble(partial, step, shares, describe(engine, step, description), tokenizer)
        except Exception as error:
            problem = why(error, partial)
    return conclude(partial, step, problem)


def describe(engine: Engine, step: int, description: Mapping[str, Any]) -> dict[str, Any]:
    """`description` with what the manifest says besides: when, how far, under which layout."""
    return {
        "saved_at": datetime.datetime.now(datetime.timezone.utc).isoformat(timespec="seconds"),
        "position": {"step": step},
        "layout": dataclasses.asdict(engine.layout),
        **description,
    }


def assemble(
    partial: Path,
    step: int,
    shares: list[dict[str, Any]],
    description: Mapping[str, Any],
    tokenizer: Path | None,
) -> None:
    """Write the manifest of all ranks' `shares`, in rank order, and give the folder its name; for rank 0."""
    final = partial.parent / step_folder(step)
    tensors: dict[str, dict[str, Any]] = {}
    counters: dict[str, dict[str, float]] = {}
    for share in shares:
        for kind, name, shape, key, box in share["places"]:
            entry = tensors.setdefault(kind, {}).setdefault(name, {"shape": list(shape), "boxes": []})
            entry["boxes"].append([share["file"]["file"], key, list(box)])
        for kind, values in share["counters"].items():
            counters.setdefault(kind, {}).update(values)
    for kind, entries in tensors.items():
        for name, entry in entries.items():
            entry["boxes"].sort(key=lambda found: found[2])
            if flaw := _cover_problem(entry):  # better found now than on resume
                raise ValueError(f"{kind} {name}: {flaw}")
    listed = [share["file"] for share in shares]
    if tokenizer is not None:
        # The file of a corpus from elsewhere has the cache's name.
        copy = partial / next(name for name in TOKENIZER_FILES if name.endswith(tokenizer.suffix))
        with open(tokenizer, "rb") as source, open(copy, "xb", opener=files.no_follow_opener) as target:
            shutil.copyfileobj(source, target)
        files.sync(copy)
        listed.append({"file": copy.name, "bytes": copy.stat().st_size, "xxh3_128": files.checksum(copy)})
    manifest = {
        "format": FORMAT,
        "version": VERSION,
        "step": step,
        **description,
        "files": listed,
        "scaler": shares[0]["scaler"],
        "counters": counters,
        "tensors": tensors,
    }
    # A line: with thousands of ranks it is tens of megabytes, and json indents in Python.
    checked = {**manifest, "checksum": files.checksum_of_json(manifest)}
    files.write_json_atomically(partial / MANIFEST, checked, indent=None)
    replaced = final.with_name(f"{REPLACED}{final.name}")
    if final.exists():  # the same step again
        shutil.rmtree(replaced, ignore_errors=True)
        os.replace(final, replaced)
    os.replace(partial, final)
    files.sync_folder(final.parent)
    shutil.rmtree(replaced, ignore_errors=True)


def _cover_problem(entry: Mapping[str, Any]) -> str | None:
    return cover_problem(whole(tuple(entry["shape"])), [Box(*box) for _, _, box in entry["boxes"]])


def note_evaluation(path: Path, validation_loss: float | None) -> None:
    """Write into a checkpoint the loss that was measured after it was saved; for one rank."""
    manifest = Checkpoint.open(path).manifest
    manifest |= {"validation_loss": validation_loss, "evaluation_owed": False}
    manifest["checksum"] = files.checksum_of_json(manifest)
    files.write_json_atomically(path / MANIFEST, manifest, indent=None)


def remove(path: Path) -> None:
    """Delete a checkpoint. A kill on the way leaves no part of it under its name; `tidy` clears the rest."""
    doomed = path.with_name(f"{DELETED}{path.name}")
    shutil.rmtree(doomed, ignore_errors=True)
    os.replace(path, doomed)
    shutil.rmtree(doomed, ignore_errors=True)


def tidy(root: Path) -> None:
    """Clear what killed processes left half written, half deleted or half replaced. For the owner of the run
    folder."""
    for path in root.glob(f"{REPLACED}*"):
        final = root / path.name.removeprefix(REPLACED)
        if not final.exists():
            os.replace(path, final)
    for pattern in (f"{DELETED}*", f"{REPLACED}*", ".*.partial"):
        for path in root.glob(pattern):
            shutil.rmtree(path, ignore_errors=True)


def why(error: Exception, partial: Path) -> tuple[str, str]:
    """What kept this rank from writing, and what to do before the next attempt, to be told to all."""
    share = f"while writing rank {processes.rank()}'s share"
    if files.is_disk_full(error):
        folder = next(folder for folder in partial.parents if folder.exists())
        free = shutil.disk_usage(folder).free
        return f"a full disk ({free / 2**20:.0f} MiB free) {share}", "make room, then "
    return f"{type(error).__name__} {share}: {error}", ""


def raise_if_any(reasons: Iterable[tuple[str, str] | None], partial: Path) -> None:
    """Raise TrainingError, alike on all ranks, for the first rank's reason; what was written is removed."""
    for reason in reasons:
        if reason is not None:
            raise processes.everywhere(_failure(*reason, partial))


def _failure(got: str, first: str, partial: Path) -> TrainingError:
    if processes.is_main():
        shutil.rmtree(partial, ignore_errors=True)
    kept = any(partial.parent.glob("step-*"))
    remedy = "earlier checkpoints are whole: " if kept else "no checkpoint was written: "
    return TrainingError(
        Problem(str(partial.parent), got, remedy=f"{remedy}{first}run the same command to resume")
    )


# Reading.


class Reader:
    """Boxes of a checkpoint's tensors. It keeps files open, which many small reads share, and so belongs to
    one piece of work; dropping it closes them."""

    def __init__(self, checkpoint: Checkpoint) -> None:
        self._checkpoint = checkpoint
        path = checkpoint.path
        # Functions of the module, since a method within its own object would keep that alive.
        self._file = lru_cache(maxsize=MAX_OPEN_FILES)(lambda file: _open(path / file))
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
        except OSError as error:
            path = str(self._checkpoint.path / file)
            got = f"a file that cannot be read ({error.strerror or error})"
            raise CheckpointError(Problem(path, got)) from error
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


def _open(path: Path) -> Any:
    # The library would wait for who writes to a pipe.
    os.close(files.open_regular(path))
    return safe_open(path, framework="pt")


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
                if flaw := _cover_problem(entry) or reader.header_problem(kind, name):
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
