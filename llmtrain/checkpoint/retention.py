"""Find the checkpoints of a run folder, check them, and delete those that need not be kept."""

from __future__ import annotations

import math
import os
import re
import shutil
import time
from collections.abc import Callable
from pathlib import Path

from llmtrain.checkpoint.manifest import MANIFEST, step_folder
from llmtrain.checkpoint.reader import Checkpoint
from llmtrain.checkpoint.store import remove
from llmtrain.distributed import processes
from llmtrain.errors import CheckpointError, Problem

Say = Callable[[str], None]
_NAME = re.compile(r"step-[0-9]{8,18}(-[0-9]{1,20})?")
"""Names of checkpoints, including those that were set aside."""


def list_steps(root: Path) -> list[Path]:
    """Return the committed checkpoint folders under `root`, oldest first."""
    return sorted(
        path for path in root.glob("step-*") if _NAME.fullmatch(path.name) and os.path.exists(path / MANIFEST)
    )


def list_held(path: Path) -> list[Path]:
    """Return the checkpoints at `path`, oldest first: `path` itself, or those of a run folder."""
    if (path / MANIFEST).exists():
        return [path]
    return list_steps(path / "checkpoints" if (path / "checkpoints").is_dir() else path)


def newest_good(root: Path, say: Say) -> tuple[Checkpoint | None, list[str]]:
    """Return the newest undamaged checkpoint under `root`, and the problems of newer ones, which are also
    reported. Ranks share the checks and agree on the result."""
    rejected: list[str] = []
    for path in reversed(processes.from_main(list_steps(root))):
        try:
            checkpoint = Checkpoint.open(path)
            damage = checkpoint.damage(processes.rank(), processes.world_size())
        except CheckpointError as error:
            checkpoint, damage = None, str(error)
        damages = [found for found in processes.gather(damage) if found]
        if checkpoint is not None and not damages:
            return checkpoint, rejected
        rejected.append(f"{path.name}: {damages[0]}")
        say(f"damaged checkpoint passed over: {rejected[-1]}")
    return None, rejected


def find(path: Path, say: Say) -> Checkpoint:
    """Return the checkpoint at `path`: a checkpoint folder, or the newest undamaged one of a run folder.
    Ranks share the checks. Raise CheckpointError if there is none or it is damaged."""
    if (path / MANIFEST).exists():
        checkpoint = Checkpoint.open(path)
        damage = checkpoint.damage(processes.rank(), processes.world_size())
        if damages := [found for found in processes.gather(damage) if found]:
            got = f"a damaged checkpoint ({damages[0]})"
            raise CheckpointError(Problem(str(path), got, remedy="name another step's folder"))
        return checkpoint
    root = path / "checkpoints" if (path / "checkpoints").is_dir() else path
    found, rejected = newest_good(root, say)
    if found is None:
        got = "; ".join(rejected) if rejected else ("no checkpoint" if path.exists() else "no such folder")
        raise CheckpointError(Problem(str(path), got, "a run folder or a checkpoint folder (step-…)"))
    return found


def prune(root: Path, current: Path, *, keep_last: int, keep_best: int, keep_every: int | None) -> None:
    """Delete the checkpoints that no rule keeps, but never `current`, the one just written. Call it on one
    rank only."""
    for path in unkept(root, current, keep_last=keep_last, keep_best=keep_best, keep_every=keep_every):
        remove(path)


def unkept(
    root: Path, current: Path, *, keep_last: int, keep_best: int, keep_every: int | None
) -> list[Path]:
    """Return the checkpoints that no rule keeps, oldest first, never `current`."""
    steps = list_steps(root)
    keep = {current, *steps[-keep_last:]}
    scored = []
    for path in steps:
        try:
            manifest = Checkpoint.open(path).manifest
        except CheckpointError:
            continue
        if keep_every and manifest["step"] % keep_every == 0:
            keep.add(path)
        loss = manifest.get("validation_loss")
        if loss is not None and math.isfinite(loss):
            scored.append((loss, path))
    keep.update(path for _, path in sorted(scored)[:keep_best])
    return [path for path in steps if path not in keep]


def set_aside_after(root: Path, step: int, say: Say) -> None:
    """Rename checkpoints later than `step`, from which a run resumes; delete none."""
    for path in list_steps(root):
        if path.name > step_folder(step):
            aside = root / "superseded" / f"{path.name}-{time.time_ns()}"
            aside.parent.mkdir(exist_ok=True)
            shutil.move(path, aside)
            say(f"set aside {path.name} as {aside}")
