"""Kills and full disks while a checkpoint is written beside training: what has a name is whole."""

from __future__ import annotations

import random
import resource
import time
from pathlib import Path

import pytest

from llmtrain.checkpoint.reader import Checkpoint
from llmtrain.checkpoint.retention import list_steps
from llmtrain.cli import main as cli
from tests.support.training import TINY_GPT
from tests.support.warm import llmtrain, start

pytestmark = pytest.mark.slow

KILLS = 4
"""Half of them while a checkpoint is begun."""


def arguments(corpus: Path, run: Path, *overrides: str) -> list[str]:
    settings = [*TINY_GPT, "evaluation.every=null", "evaluation.at_start=false", "checkpoint.every=1"]
    return ["train", *settings, f"data.path={corpus}", f"run.dir={run}", *overrides]


def steps_of(run: Path) -> list[int]:
    return [int(path.name.removeprefix("step-")) for path in list_steps(run / "checkpoints")]


def test_kills_while_checkpoints_are_written(
    corpus: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
):
    """States of 20 MB, so that most of a step's time some file is half written."""
    run = tmp_path / "run"
    overrides = ["model.hidden_size=256", "batch.global_size=2", "checkpoint.keep_best=0"]
    num_partials, newest = 0, 0
    for number in range(KILLS):
        process = start(*arguments(corpus, run, *overrides, "train.steps=100000"))
        deadline = time.monotonic() + 120
        while max(steps_of(run), default=0) < newest + 3:
            assert process.poll() is None, process.stderr.read() if process.stderr else ""
            assert time.monotonic() < deadline
            time.sleep(0.002)
        if number % 2:  # as soon as one begins; else at any time
            while not list((run / "checkpoints").glob(".*.partial")):
                time.sleep(0.0002)
        time.sleep(random.SystemRandom().uniform(0, 0.01 if number % 2 else 0.3))
        process.kill()
        process.wait(60)
        num_partials += len(list((run / "checkpoints").glob(".*.partial")))
        assert cli.run_verb("checkpoint", ["verify", str(run)]) == 0, capsys.readouterr()
        newest = max(steps_of(run))
    assert num_partials

    end = newest + 2
    done = llmtrain(*arguments(corpus, run, *overrides, f"train.steps={end}", "schedule=constant"))
    assert done.returncode == 0, done.stderr
    assert f"resuming from {run}/checkpoints/step-{newest:08d}" in done.stderr
    assert f"step {end}: checkpoint" in done.stderr
    assert steps_of(run)[-1] == end
    assert not list((run / "checkpoints").glob(".*"))
    assert cli.run_verb("checkpoint", ["verify", str(run)]) == 0


def test_a_disk_that_gets_full(corpus: Path, tmp_path: Path):
    """A run with room for its first checkpoints, started again with room for none: a file may not grow as
    large as their 800 kB, which is how a quota answers."""
    run = tmp_path / "run"
    command = arguments(corpus, run)
    assert llmtrain(*command, "train.steps=2").returncode == 0
    process = start(*command, "train.steps=20")
    resource.prlimit(process.pid, resource.RLIMIT_FSIZE, (400_000, 400_000))
    _, said = process.communicate(timeout=120)
    assert process.returncode == 2, said
    (line,) = [line for line in said.splitlines() if line.startswith("llmtrain: error: ")]
    for words in ("checkpoints: got a full disk", "MiB free", "earlier checkpoints are whole", "make room"):
        assert words in line
    assert "Traceback" not in said
    assert [Checkpoint.open(path).damage() for path in list_steps(run / "checkpoints")] == [None, None]
    assert not list((run / "checkpoints").glob(".*"))
    done = llmtrain(*command, "train.steps=4")
    assert done.returncode == 0, done.stderr
    assert "resuming from" in done.stderr
    assert steps_of(run)[-1] == 4
