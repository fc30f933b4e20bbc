"""Recurrent networks: kill -9 amid a run and the same command again give the run that was never killed."""

from __future__ import annotations

import random
from pathlib import Path

import pytest

from llmtrain.checkpoint.reader import Checkpoint
from llmtrain.checkpoint.retention import list_steps
from tests.faults.test_train_faults import curve, kill_at
from tests.parity.test_recurrent import KINDS, rows, settings
from tests.support.warm import llmtrain

pytestmark = pytest.mark.slow
__all__ = ["rows"]
SAVING = ("train.steps=12", "checkpoint.every=3", "evaluation.every=6", "evaluation.max_samples=16")


@pytest.mark.in_turns(3)
@pytest.mark.parametrize("kind", KINDS)
def test_kill_and_resume_is_bit_exact(
    kind: str, rows: Path, corpus: Path, paired_corpus: Path, tmp_path: Path
) -> None:
    words = ["train", *settings(kind, rows, corpus, paired_corpus, tmp_path / "tables"), *SAVING]
    whole, run = tmp_path / "whole", tmp_path / "run"
    assert llmtrain(*words, f"run.dir={whole}").returncode == 0
    killed = [*words, f"run.dir={run}"]
    step = random.SystemRandom().randint(1, 10)
    kill_at(step, killed, run)
    assert llmtrain(*killed).returncode == 0
    assert curve(run) == curve(whole), f"killed at step {step}"
    ours, theirs = (Checkpoint.open(list_steps(path / "checkpoints")[-1]) for path in (run, whole))
    assert ours.step == theirs.step == 12
    for entry, expected in zip(ours.manifest["files"], theirs.manifest["files"], strict=True):
        assert entry == expected  # weights and optimizer state, by checksum
