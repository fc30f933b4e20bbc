"""Perceptrons, residual networks and GANs: kill -9 amid a run, and the same command again: the same run."""

from __future__ import annotations

import json
import random
from pathlib import Path
from typing import Any

import pytest

from llmtrain.checkpoint.reader import Checkpoint
from llmtrain.checkpoint.retention import list_steps
from tests.faults.test_train_faults import kill_at
from tests.parity import test_resnet, test_turns
from tests.support.warm import llmtrain

pytestmark = pytest.mark.slow

STEPS = 120
KINDS = {
    "MLP": ("model=mlp", "model.hidden=[64]", "model.dropout=0.2", "data=mnist", "batch.sequence_length=1"),
    "ResNet": (*test_resnet.TINY, *test_resnet.size(8, 4)),
    "GAN": (*test_turns.TINY, *test_turns.LINEAR),
}
COMMON = (f"train.steps={STEPS}", "checkpoint.every=30", "evaluation.every=60", "evaluation.max_samples=32")
CLOCK = ("time", "seconds", "per_s", "mfu", "memory", "gib", "eta")
"""Parts of the names of metrics that no two runs share."""


def computed(run: Path) -> list[dict[str, Any]]:
    """What each line of the metrics says of the training itself."""
    lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    return [
        {name: value for name, value in line.items() if not any(part in name for part in CLOCK)}
        for line in lines
    ]


@pytest.mark.in_turns(3)
@pytest.mark.parametrize("kind", KINDS)
def test_kill_and_resume_is_bit_exact(kind: str, tmp_path: Path) -> None:
    words = ["train", *(word for word in KINDS[kind] if not word.startswith("train.steps")), *COMMON]
    whole, run = tmp_path / "whole", tmp_path / "run"
    done = llmtrain(*words, f"run.dir={whole}")
    assert done.returncode == 0, done.stderr
    step = random.SystemRandom().randint(1, STEPS // 2)
    killed = kill_at(step, [*words, f"run.dir={run}"], run)
    assert killed.returncode == -9
    done = llmtrain(*words, f"run.dir={run}")
    assert done.returncode == 0, done.stderr
    found = {line["step"]: line for line in computed(run) if "loss" in line}
    assert found == {line["step"]: line for line in computed(whole) if "loss" in line}, step
    ours, theirs = (Checkpoint.open(list_steps(path / "checkpoints")[-1]) for path in (run, whole))
    assert ours.step == theirs.step == STEPS
    for entry, expected in zip(ours.manifest["files"], theirs.manifest["files"], strict=True):
        assert entry == expected  # weights and optimizer state, by checksum
