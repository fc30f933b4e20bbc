"""A run that is killed with kill -9 and started again: losses and weights bit for bit those of one that was
never stopped."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import torch

from llmtrain.checkpoint.reader import Checkpoint
from llmtrain.checkpoint.retention import list_steps
from tests.gpu.runs import family_overrides
from tests.gpu.table import REPOSITORY, Row, judged

STEPS, KILLED_AT = 24, 6
RUN = (
    f"train.steps={STEPS}",
    "checkpoint.every=4",
    "evaluation.every=null",
    "evaluation.at_start=false",
    "track=[jsonl]",
)
CASES = {"fp32, dropout": ("precision=fp32", "model.dropout=0.1"), "bf16, documents": ("precision=bf16",)}
"""Dropout's masks are made by key; without dropout a GPU attends to each document by its kernel."""


def check(device: str, folder: Path) -> Iterator[Row]:
    family = family_overrides("GPT-2 form", device, folder)
    # On a CPU the second would go the way of the first.
    names = list(CASES)[: 1 if device == "cpu" else None]
    with ThreadPoolExecutor() as pool:  # starting takes longer than training
        yield from pool.map(
            lambda name: _case(name, (*family, *RUN, *CASES[name]), folder / "resume" / name[:4]), names
        )


def _case(name: str, settings: Sequence[str], folder: Path) -> Row:
    shutil.rmtree(folder, ignore_errors=True)
    whole, killed = folder / "whole", folder / "killed"
    never_stopped, process = start(settings, whole), start(settings, killed)
    seen = wait_for_step(process, killed)
    process.kill()
    process.wait()
    start(settings, killed).wait()
    never_stopped.wait()
    same_curve = len(curve(whole)) == STEPS and curve(killed) == curve(whole)
    apart = max((abs(a / b - 1) for a, b in zip(losses(killed), losses(whole), strict=False)), default=1.0)
    weights = same_weights(killed, whole)
    detail = (
        f"killed at step {seen} of {STEPS}; losses and norms the same: {same_curve} ({apart:.1e} apart), "
    )
    return judged("resume", name, seen < STEPS and same_curve and weights, f"{detail}weights: {weights}")


def start(settings: Sequence[str], run: Path) -> subprocess.Popen[bytes]:
    command = [sys.executable, "-m", "llmtrain", "train", *settings, f"run.dir={run}"]
    return subprocess.Popen(command, cwd=REPOSITORY)


def wait_for_step(process: subprocess.Popen[bytes], run: Path) -> int:
    """Until a checkpoint is there and the step to be killed at is done; → the last step that was seen."""
    while process.poll() is None:
        done = max(curve(run), default=0)
        if done >= KILLED_AT and list_steps(run / "checkpoints"):
            return done
        time.sleep(0.002)
    return STEPS


def curve(run: Path) -> dict[int, tuple[float, float]]:
    """Step → loss and gradient norm."""
    file = run / "metrics.jsonl"
    lines = file.read_text().split("\n")[:-1] if file.exists() else []
    records = [json.loads(line) for line in lines]
    return {r["step"]: (r["loss"], r["grad_norm"]) for r in records if "loss" in r}


def losses(run: Path) -> list[float]:
    return [loss for _, (loss, _) in sorted(curve(run).items())]


def same_weights(a: Path, b: Path) -> bool:
    ours, theirs = (Checkpoint.open(list_steps(run / "checkpoints")[-1]).weights() for run in (a, b))
    return list(ours) == list(theirs) and all(torch.equal(ours[name], theirs[name]) for name in ours)
