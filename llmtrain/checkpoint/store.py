"""Checkpoints that know no layout: each rank writes the flat fragments of the parameters that it owns,
and whoever reads asks for any range of any parameter.

    step-00000100/
      rank-00000.safetensors   weights and optimizer state: `KIND/NAME@START`, 1-D fp32
      rank-00001.safetensors
      tokenizer.model
      manifest.json            written last: what lies where, sizes, checksums, the run's config

The folder has a temporary name until all of it is on the disk, so that a kill at any moment leaves
earlier checkpoints and no half of this one. Nothing in it is unpickled.
"""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import xxhash
from safetensors import safe_open
from safetensors.torch import save_file

from llmtrain import files
from llmtrain.engine.base import Engine, optimizer_slot, optimizer_tensors, set_optimizer_counter
from llmtrain.errors import CheckpointError, Problem, TrainingError
from llmtrain.parallel import distributed

FORMAT = "llmtrain-checkpoint"
VERSION = 1
MANIFEST = "manifest.json"
DELETED = ".deleted-"
TOKENIZER = "tokenizer.model"
WEIGHT = "weight"
OPTIMIZER = "optimizer."
"""Prefix of the kinds that are optimizer state: `optimizer.exp_avg`."""


def step_folder(step: int) -> str:
    return f"step-{step:08d}"


def save(
    root: Path, step: int, engine: Engine, description: Mapping[str, Any], tokenizer: Path | None
) -> Path:
    """Write the engine's state as `root/step-…`; called by all ranks, returns on all when it is on disk.

    `description` is JSON that goes into the manifest: model config, run config, tracker state, ….
    Raises TrainingError on all ranks when the disk is full; earlier checkpoints stay.
    """
    final = root / step_folder(step)
    partial = root / f".{final.name}.partial"
    problem: Exception | None = None
    if distributed.is_main():
        try:
            root.mkdir(parents=True, exist_ok=True)
            shutil.rmtree(partial, ignore_errors=True)
            partial.mkdir()
        except OSError as error:
            problem = error
    distributed.barrier()
    written: dict[str, Any] = {}
    if problem is None:
        try:
            written = _write_share(partial, engine)
        except Exception as error:  # every rank must reach the gather below
            problem = error
    shares = distributed.gather((written, None if problem is None else _explain(problem, partial)))
    _raise_first([message for _, message in shares], partial)
    if distributed.is_main():
        try:
            _commit(partial, final, step, [share for share, _ in shares], engine, description, tokenizer)
        except Exception as error:
            problem = error
    _raise_first([distributed.from_main(None if problem is None else _explain(problem, partial))], partial)
    return final


def _write_share(folder: Path, engine: Engine) -> dict[str, Any]:
    """Write this rank's fragments; → what was written, for the manifest."""
    tensors: dict[str, torch.Tensor] = {}
    places: list[tuple[str, str, tuple[int, ...], int, int, str]] = []
    counters: dict[str, dict[str, float]] = {}
    for fragment in engine.fragments():
        parts: list[tuple[str, torch.Tensor]] = [(WEIGHT, fragment.view_of(fragment.holder))]
        for key, value in optimizer_tensors(engine.optimizer, fragment):
            if isinstance(value, torch.Tensor):
                parts.append((OPTIMIZER + key, value))
            else:
                counters.setdefault(OPTIMIZER + key, {})[fragment.name] = value
        for kind, tensor in parts:
            key = f"{kind}/{fragment.name}@{fragment.start}"
            tensors[key] = tensor.cpu()
            places.append((kind, fragment.name, fragment.shape, fragment.start, fragment.stop, key))
    path = folder / f"rank-{distributed.rank():05d}.safetensors"
    save_file(tensors, path)
    files.sync(path)
    return {
        "file": {"file": path.name, "bytes": path.stat().st_size, "xxh3_128": files.checksum(path)},
        "places": places,
        "counters": counters,
        "scaler": engine.scaler_state(),
    }


def _commit(
    partial: Path,
    final: Path,
    step: int,
    shares: list[dict[str, Any]],
    engine: Engine,
    description: Mapping[str, Any],
    tokenizer: Path | None,
) -> None:
    tensors: dict[str, dict[str, Any]] = {}
    counters: dict[str, dict[str, float]] = {}
    for share in shares:
        for kind, name, shape, start, stop, key in share["places"]:
            entry = tensors.setdefault(kind, {}).setdefault(name, {"shape": list(shape), "fragments": []})
            entry["fragments"].append([share["file"]["file"], key, start, stop])
        for kind, values in share["counters"].items():
            counters.setdefault(kind, {}).update(values)
    for kind in tensors.values():
        for entry in kind.values():
            entry["fragments"].sort(key=lambda fragment: fragment[2])
    listed = [share["file"] for share in shares]
    if tokenizer is not None:
        copy = partial / TOKENIZER
        shutil.copyfile(tokenizer, copy)
        files.sync(copy)
        listed.append({"file": TOKENIZER, "bytes": copy.stat().st_size, "xxh3_128": files.checksum(copy)})
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
    files.write_json_atomically(partial / MANIFEST, {**manifest, "checksum": _checksum(manifest)})
    if final.exists():  # the same step again
        remove(final)
    os.replace(partial, final)
    files.sync_folder(final.parent)


def _checksum(manifest: Mapping[str, Any]) -> str:
    """xxh3-128 of what the manifest says, in hex, its own checksum left out."""
    body = {key: value for key, value in manifest.items() if key != "checksum"}
    return xxhash.xxh3_128_hexdigest(json.dumps(body, sort_keys=True).encode())


def remove(path: Path) -> None:
    """Delete a checkpoint. A kill on the way leaves no part of it under its name; `tidy` clears the rest."""
    doomed = path.with_name(f"{DELETED}{path.name}")
    shutil.rmtree(doomed, ignore_errors=True)
    os.replace(path, doomed)
    shutil.rmtree(doomed, ignore_errors=True)


def tidy(root: Path) -> None:
    """Delete what killed processes left half written or half deleted. For the owner of the run folder."""
    for pattern in (f"{DELETED}*", ".*.partial"):
        for path in root.glob(pattern):
            shutil.rmtree(path, ignore_errors=True)


def _explain(error: Exception, folder: Path) -> str:
    if files.is_disk_full(error):
        free = shutil.disk_usage(folder.parent if folder.parent.exists() else folder.parent.parent).free
        return f"a full disk ({free / 2**20:.0f} MiB free) while writing rank {distributed.rank()}'s share"
    return f"{type(error).__name__} while writing rank {distributed.rank()}'s share: {error}"


def _raise_first(messages: Iterable[str | None], partial: Path) -> None:
    for message in messages:
        if message is not None:
            if distributed.is_main():
                shutil.rmtree(partial, ignore_errors=True)
            kept = any(partial.parent.glob("step-*"))
            remedy = "earlier checkpoints are whole: " if kept else "no checkpoint was written: "
            remedy += "make room, then run the same command to resume"
            raise distributed.everywhere(TrainingError(Problem(str(partial.parent), message, remedy=remedy)))


class Weights(Mapping[str, torch.Tensor]):
    """Canonical name → whole fp32 weight; one is in memory at a time unless the caller keeps them."""

    def __init__(self, checkpoint: Checkpoint) -> None:
        self._checkpoint = checkpoint
        self._entries = checkpoint.manifest["tensors"][WEIGHT]

    def __getitem__(self, name: str) -> torch.Tensor:
        shape = torch.Size(self._entries[name]["shape"])
        return self._checkpoint.read(WEIGHT, name, 0, shape.numel()).view(shape)

    def __iter__(self) -> Iterator[str]:
        return iter(self._entries)

    def __len__(self) -> int:
        return len(self._entries)


@dataclass(frozen=True)
class Checkpoint:
    """A committed checkpoint, open for reading."""

    path: Path
    manifest: dict[str, Any]

    @classmethod
    def open(cls, path: Path) -> Checkpoint:
        """Read the manifest. Raises CheckpointError when it is not a checkpoint of a version known here."""
        try:
            manifest = json.loads((path / MANIFEST).read_text())
        except FileNotFoundError:
            raise CheckpointError(Problem(str(path), "no manifest.json", "a checkpoint folder")) from None
        except (ValueError, OSError) as error:
            raise CheckpointError(
                Problem(f"{path / MANIFEST}", f"an unreadable manifest ({error})")
            ) from None
        if not isinstance(manifest, dict) or manifest.get("format") != FORMAT:
            raise CheckpointError(Problem(str(path / MANIFEST), "another kind of file", FORMAT))
        if manifest.get("version") != VERSION:
            version = manifest.get("version")
            raise CheckpointError(
                Problem(
                    str(path), f"version {version}", f"version {VERSION}", "use the llmtrain that wrote it"
                )
            )
        renamed = path.name.startswith("step-") and path.name != step_folder(manifest.get("step", -1))
        if renamed or manifest.get("checksum") != _checksum(manifest):
            remedy = "name another step's folder"
            raise CheckpointError(
                Problem(str(path / MANIFEST), "an altered manifest", "what was written", remedy)
            )
        return cls(path, manifest)

    @property
    def step(self) -> int:
        return int(self.manifest["step"])

    @property
    def tokenizer(self) -> Path | None:
        path = self.path / TOKENIZER
        return path if path.exists() else None

    def damage(self, part: int = 0, parts: int = 1) -> str | None:
        """What is wrong with its files, by size and checksum: the first problem, or None. `part` of
        `parts` checks every parts-th file, so that ranks share the work."""
        for entry in self.manifest["files"][part::parts]:
            path = self.path / entry["file"]
            if not path.exists():
                return f"{entry['file']} is missing"
            if path.stat().st_size != entry["bytes"]:
                return f"{entry['file']} has {path.stat().st_size:,} bytes, not {entry['bytes']:,}"
            if files.checksum(path) != entry["xxh3_128"]:
                return f"{entry['file']} has another checksum than when it was written"
        return None

    def read(self, kind: str, name: str, start: int, stop: int) -> torch.Tensor:
        """Elements [start, stop) of the flattened parameter `name`, 1-D fp32."""
        pieces: list[torch.Tensor] = []
        at = start
        for file, key, begin, end in self.manifest["tensors"][kind][name]["fragments"]:
            if begin <= at < min(end, stop):
                with safe_open(self.path / file, framework="pt") as handle:
                    piece = handle.get_slice(key)[at - begin : min(end, stop) - begin]
                pieces.append(piece)
                at += piece.numel()
        if at != stop:
            raise CheckpointError(Problem(str(self.path), f"no elements {at}–{stop} of {kind} {name}"))
        return pieces[0] if len(pieces) == 1 else torch.cat(pieces)

    def weights(self) -> Weights:
        """All weights, fp32, by their canonical names, each read when asked for."""
        return Weights(self)

    def restore(self, engine: Engine) -> None:
        """Put weights, optimizer state and loss scaler into the engine, whatever its layout."""
        kinds = [kind for kind in self.manifest["tensors"] if kind.startswith(OPTIMIZER)]
        with torch.no_grad():
            for fragment in engine.held_fragments():
                span = fragment.name, fragment.start, fragment.stop
                fragment.view_of(fragment.holder).copy_(self.read(WEIGHT, *span))
                for kind in kinds:
                    if fragment.name in self.manifest["tensors"][kind]:
                        slot = optimizer_slot(engine.optimizer, fragment, kind.removeprefix(OPTIMIZER))
                        slot.copy_(self.read(kind, *span))
                for kind, values in self.manifest["counters"].items():
                    if fragment.name in values:
                        key = kind.removeprefix(OPTIMIZER)
                        set_optimizer_counter(engine.optimizer, fragment, key, values[fragment.name])
        engine.refresh_weights()
        engine.load_scaler_state(self.manifest["scaler"])
