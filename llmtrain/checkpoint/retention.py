"""Find the checkpoints of a run folder, check them, and delete those that need not be kept."""

from __future__ import annotations

import math
import os
import re
import shutil
import time
from collections.abc import Collection, Iterable, Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any, NamedTuple

from llmtrain.checkpoint.manifest import MANIFEST, step_folder
from llmtrain.checkpoint.reader import Checkpoint
from llmtrain.checkpoint.store import remove
from llmtrain.distributed import processes
from llmtrain.errors import CheckpointError, Problem
from llmtrain.scoring.direction import goes_down
from llmtrain.standard_streams import Say

LOSS = "loss"
SUPERSEDED = "superseded"
"""Folder in that of the checkpoints: those that were set aside."""
BEST = "best"
"""RUN/best stands for the best checkpoint of a run."""
_NAME = re.compile(r"step-[0-9]{8,18}(-[0-9]{1,20})?")
"""Names of checkpoints, including those that were set aside."""


class Best(NamedTuple):
    """The best checkpoint of a run."""

    path: Path
    metric: str
    """The figure by which it is."""


def is_name(name: str) -> bool:
    """Return whether a folder of this name may be a checkpoint."""
    return _NAME.fullmatch(name) is not None


def list_steps(root: Path) -> list[Path]:
    """Return the committed checkpoint folders under `root`, oldest first."""
    return sorted(
        path for path in root.glob("step-*") if is_name(path.name) and os.path.exists(path / MANIFEST)
    )


def named(path: Path) -> Path:
    """Return the checkpoint that RUN/best stands for, the best of those that the run has kept; of any other
    path the path itself. Raise CheckpointError if none of them has been evaluated."""
    run = path.parent
    if path.name != BEST or path.exists() or not run.is_dir():
        return path
    found = best_of(run)
    if found is None:
        allowed = "a run whose checkpoints were evaluated"
        raise CheckpointError(Problem(str(path), "no checkpoint with validation figures", allowed))
    return found.path


def best_of(run: Path) -> Best | None:
    """Return the best checkpoint of a run folder by the figure that its newest one was judged by."""
    manifests = _manifests(list_held(run))
    if not manifests:
        return None
    metric = _metric_of(manifests[max(manifests)])
    ranked = _ranked(manifests, metric)
    return Best(ranked[0], metric) if ranked else None


def _manifests(paths: Iterable[Path]) -> dict[Path, Mapping[str, Any]]:
    """Return the manifests of those checkpoints whose manifest is whole."""
    found: dict[Path, Mapping[str, Any]] = {}
    for path in paths:
        with suppress(CheckpointError):
            found[path] = Checkpoint.open(path).manifest
    return found


def _metric_of(manifest: Mapping[str, Any]) -> str:
    """Return the figure that tells which checkpoints of a run are the best."""
    return (manifest.get("evaluations") or {}).get("metric", LOSS)


def _ranked(manifests: Mapping[Path, Mapping[str, Any]], metric: str) -> list[Path]:
    """Return the checkpoints with a value of the figure, the best first, of equal ones the oldest."""
    values = {path: figure_of(manifest, metric) for path, manifest in manifests.items()}
    sign = 1 if goes_down(metric) else -1
    return [
        path
        for _, path in sorted((sign * value, path) for path, value in values.items() if value is not None)
    ]


def figure_of(manifest: Mapping[str, Any], metric: str) -> float | None:
    """Return a figure of the evaluation at a checkpoint's step; None if there is none that is finite."""
    figures = manifest.get("validation") or {}
    value = figures.get(metric)
    if value is None and metric == LOSS:
        value = manifest.get("validation_loss")  # all that older checkpoints have
    return value if value is not None and math.isfinite(value) else None


def list_held(path: Path) -> list[Path]:
    """Return the checkpoints at `path`, oldest first: `path` itself, or those of a run folder."""
    path = named(path)
    if (path / MANIFEST).exists():
        return [path]
    return list_steps(path / "checkpoints" if (path / "checkpoints").is_dir() else path)


def newest_good(root: Path, say: Say, at_most: int | None = None) -> tuple[Checkpoint | None, list[str]]:
    """Return the newest undamaged checkpoint under `root`, and the problems of newer ones, which are also
    reported. Ranks share the checks and agree on the result.

    at_most: its last step; None: any."""
    rejected: list[str] = []
    for path in reversed(processes.from_main(list_steps(root))):
        if at_most is not None and path.name > step_folder(at_most):
            continue
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
    path = named(path)
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


class Rules(NamedTuple):
    """Which checkpoints of a run are kept."""

    keep_last: int = 2
    keep_best: int = 1
    keep_every: int | None = None
    metric: str | None = None
    """Figure by which checkpoints are the best; None: the one that the run judged them by."""


def prune(root: Path, current: Path, rules: Rules, held: Collection[Path] = ()) -> None:
    """Delete the checkpoints that no rule keeps, but never `current`, the one just written, nor those that
    are `held` for now. Call it on one rank only."""
    for path in unkept(root, current, rules):
        if path not in held:
            remove(path)


def unkept(root: Path, current: Path, rules: Rules) -> list[Path]:
    """Return the checkpoints that no rule keeps, oldest first, never `current`."""
    steps = list_steps(root)
    manifests = _manifests(steps)
    keep = {current, *steps[-rules.keep_last :]}
    if rules.keep_every:
        keep.update(path for path in manifests if manifests[path]["step"] % rules.keep_every == 0)
    metric = rules.metric or _metric_of(manifests.get(current, {}))
    keep.update(_ranked(manifests, metric)[: rules.keep_best])
    return [path for path in steps if path not in keep]


def set_aside_after(root: Path, step: int, say: Say) -> None:
    """Rename checkpoints later than `step`, from which a run resumes; delete none."""
    for path in list_steps(root):
        if path.name > step_folder(step):
            aside = root / SUPERSEDED / f"{path.name}-{time.time_ns()}"
            aside.parent.mkdir(exist_ok=True)
            shutil.move(path, aside)
            say(f"set aside {path.name} as {aside}")
