"""Write imported weights as a checkpoint of step 0, without optimizer state and run.

    output/checkpoints/step-00000000/
      weights-00001.safetensors   in the format of checkpoint/store.py, each tensor in one box
      tokenizer.model             or tokenizer.bundle.json
      manifest.json

One tensor is in memory at a time. The checkpoint appears complete or not at all.
"""

from __future__ import annotations

import datetime
import shutil
import tempfile
from collections.abc import Collection, Mapping
from math import prod
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from llmtrain import files
from llmtrain.checkpoint import retention, store
from llmtrain.checkpoint.finite import FiniteCheck
from llmtrain.checkpoint.manifest import WEIGHT, step_folder
from llmtrain.checkpoint.reader import Checkpoint
from llmtrain.checkpoint.writer import write_safetensors
from llmtrain.errors import CheckpointError, Problem
from llmtrain.tensor_boxes import matrix_shape, whole
from llmtrain.tokenizers.base import Tokenizer

FILE_BYTES = 4 * 2**30
"""Approximate size of a weights file. Ranks divide the verification of a checkpoint by files."""


def save_imported(
    output: Path,
    weights: Mapping[str, Tensor],
    shapes: Mapping[str, tuple[int, ...]],
    description: Mapping[str, Any],
    tokenizer: Tokenizer | None,
    *,
    overwrite: bool = False,
    file_bytes: int = FILE_BYTES,
    left_out: Collection[str] = (),
    statistics: Collection[str] = (),
) -> Path:
    """Write `weights` (canonical name → tensor, each read once) to `output`; return the path of the
    checkpoint.

    shapes: shapes of all weights, in the order of writing.
    description: JSON values for the manifest: imported_from, the config of the model, ….
    overwrite: replace an earlier import.
    left_out: names of further weights, which the base in the description holds.
    statistics: names of those that forward passes change, not an optimizer.
    Raise CheckpointError if weights are not finite, or `output` holds something else or is not writable.
    """
    root = output / "checkpoints"
    _refuse_foreign(output, root, overwrite)
    partial = root / f".{step_folder(0)}.partial"
    check = FiniteCheck()
    try:
        root.mkdir(parents=True, exist_ok=True)
        store.tidy(root)
        partial.mkdir()
        groups = _groups(shapes, file_bytes)
        shares = [
            _write(partial, number, group, weights, shapes, check) for number, group in enumerate(groups, 1)
        ]
        check.refuse(description["imported_from"])
        shares[0] |= {"frozen": sorted(left_out), "statistics": sorted(statistics)}
        facts = {
            "saved_at": datetime.datetime.now(datetime.timezone.utc).isoformat(timespec="seconds"),
            "position": {"step": 0},
            **description,
        }
        with tempfile.TemporaryDirectory() as folder:
            saved = None if tokenizer is None else tokenizer.save(Path(folder))
            store.assemble(partial, 0, shares, facts, saved)
    except OSError as error:
        remedy = "make room, then import again"
        raise CheckpointError(files.disk_problem(error, output, if_full=remedy)) from error
    finally:
        shutil.rmtree(partial, ignore_errors=True)
    return root / step_folder(0)


def _refuse_foreign(output: Path, root: Path, overwrite: bool) -> None:
    if not output.exists() or (output.is_dir() and not any(output.iterdir())):
        return
    got, remedy = "something that is no import", "choose another output"
    if root.is_dir() and {path.name for path in output.iterdir()} == {root.name}:
        try:
            held = [Checkpoint.open(path) for path in retention.list_steps(root)]
        except CheckpointError:
            held = []
        if all(checkpoint.is_imported for checkpoint in held):
            if overwrite or not held:
                return
            got, remedy = "an earlier import", "choose another output, or set overwrite=true"
    raise CheckpointError(Problem(str(output), got, "a new or empty folder", remedy))


def _groups(shapes: Mapping[str, tuple[int, ...]], file_bytes: int) -> list[list[str]]:
    """Return the names of the tensors of each file, in order."""
    groups: list[list[str]] = [[]]
    size = 0
    for name, shape in shapes.items():
        needed = 4 * prod(shape)
        if groups[-1] and size + needed > file_bytes:
            groups.append([])
            size = 0
        groups[-1].append(name)
        size += needed
    return groups


def _write(
    partial: Path,
    number: int,
    names: list[str],
    weights: Mapping[str, Tensor],
    shapes: Mapping[str, tuple[int, ...]],
    check: FiniteCheck,
) -> dict[str, Any]:
    """Write one file; return its description for the manifest."""
    keys = {f"{WEIGHT}/{name}@0,0": name for name in names}

    def fetch(key: str) -> Tensor:
        weight = weights[keys[key]]
        check.look(keys[key], weight)
        return weight.to(torch.float32).reshape(matrix_shape(shapes[keys[key]]))

    announced = [
        (key, torch.empty(matrix_shape(shapes[name]), dtype=torch.float32, device="meta"))
        for key, name in keys.items()
    ]
    path = partial / f"weights-{number:05d}.safetensors"
    written = write_safetensors(path, announced, fetch=fetch)
    files.sync_folder(partial)
    return {
        "file": {"file": path.name, "bytes": written.bytes, "xxh3_128": written.checksum},
        "places": [
            (WEIGHT, name, shapes[name], key, tuple(whole(shapes[name]))) for key, name in keys.items()
        ],
        "counters": {},
        "scaler": {},
        "frozen": [],
        "statistics": [],
    }
