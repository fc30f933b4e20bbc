"""The base of a checkpoint: the folder whose weights it leaves out, since its run did not change them."""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import NamedTuple

import torch
import xxhash

from llmtrain import files
from llmtrain.checkpoint.manifest import MANIFEST, Base
from llmtrain.checkpoint.reader import Checkpoint
from llmtrain.config import decode_json
from llmtrain.errors import CheckpointError, Problem
from llmtrain.interchange import huggingface

MERGE = "llmtrain export form=merged makes a folder that needs no base"


class Given(NamedTuple):
    """A folder of weights that may be a base."""

    path: Path
    digest: str
    """Of its weights, which takes a reading of all of them."""

    @classmethod
    def of(cls, path: Path) -> Given:
        return cls(path, digest_of(path))


def record_of(folder: Path, checkpoints: Path) -> Base:
    """Return how the checkpoints in the folder `checkpoints` refer to the weights of `folder`, a checkpoint
    or a Hugging Face folder. Read all of them.

    Raise CheckpointError if a file of a checkpoint is damaged."""
    folder = folder.absolute()
    # A checkpoint lies one level deeper.
    relative = os.path.relpath(folder, checkpoints.absolute() / "step")
    return Base(str(folder), digest_of(folder), relative)


def base_of(checkpoint: Checkpoint) -> Base | None:
    """Return the reference of a checkpoint that leaves weights out; None of one that holds all."""
    said = checkpoint.manifest.get("base")
    return None if said is None else decode_json(Base, said)


def with_base(checkpoint: Checkpoint, given: Path | Given | None = None) -> Checkpoint:
    """Return the checkpoint with the weights that it leaves out at hand. Return any other unchanged.

    given: where to look first; its weights are not read again for a digest that is there.
    Raise CheckpointError if the base is gone, or has other weights by now.
    """
    base = base_of(checkpoint)
    if base is None or checkpoint.base is not None:
        return checkpoint
    known = {given.path: given.digest} if isinstance(given, Given) else {}
    first = given.path if isinstance(given, Given) else given
    places = [path for path in (first, Path(base.path), checkpoint.path / base.relative) if path is not None]
    found = [path for path in dict.fromkeys(places) if _holds_weights(path)]
    where = f"{checkpoint.path}: base"
    if not found:
        got = f"{base.path}, which is gone"
        allowed = "the folder that it was trained over, whose weights it does not repeat"
        raise CheckpointError(Problem(where, got, allowed, f"put it back; {MERGE}"))
    for path in found:
        if (known.get(path) or digest_of(path)) == base.digest:
            return replace(checkpoint, base=_weights_of(path))
    got = f"{found[0]}, whose weights have changed since"
    raise CheckpointError(Problem(where, got, "those that it was trained over", f"restore them; {MERGE}"))


def _holds_weights(path: Path) -> bool:
    return (path / MANIFEST).exists() or (path / huggingface.CONFIG).exists()


def _weights_of(path: Path) -> Mapping[str, torch.Tensor]:
    if (path / huggingface.CONFIG).exists():
        return huggingface.import_folder(path).weights
    return Checkpoint.open(path).weights()


def digest_of(path: Path) -> str:
    """Return a hash of all weights of a folder, in hex."""
    digest = xxhash.xxh3_128()
    if (path / huggingface.CONFIG).exists():
        for file in sorted(path.glob("*.safetensors")):
            digest.update(f"{file.name} {files.checksum(file)}\n".encode())
        return digest.hexdigest()
    checkpoint = Checkpoint.open(path)
    if flaw := checkpoint.damage():
        raise CheckpointError(Problem(str(path), f"a damaged checkpoint ({flaw})"))
    # A checkpoint may be renamed, and an owed evaluation be noted in its manifest: neither changes a weight.
    for entry in checkpoint.manifest["files"]:
        digest.update(f"{entry['file']} {entry['xxh3_128']}\n".encode())
    return digest.hexdigest()
