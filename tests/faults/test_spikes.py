"""Runs over samples that make a step bad: it is left out, stops the run, or sends it back, and a run that is
killed meanwhile ends as one that was not."""

from __future__ import annotations

import json
import random
import time
from pathlib import Path
from typing import Any

import pytest

from llmtrain.checkpoint.reader import Checkpoint
from llmtrain.checkpoint.retention import list_steps
from llmtrain.track.events import EVENTS, read_events
from tests.support.training import TINY_GPT
from tests.support.warm import PRELUDE, finish, llmtrain, on_ranks, start_ranks

pytestmark = pytest.mark.slow

SIZE = 8
SPOILS = """
from llmtrain.engine.deepspeed import DeepSpeedEngine
from llmtrain.engine.local import LocalEngine

def spoil(kind):
    step, accumulate = kind.train_step, kind._accumulate

    def train_step(self, micro_batches, **keys):
        self.factor = 1e4 if micro_batches[0].samples.start in range({first}, {last}) else 1.0
        return step(self, micro_batches, **keys)

    def scaled(self, count, batch, scale):
        return accumulate(self, count, batch, scale * self.factor)

    kind.train_step, kind._accumulate = train_step, scaled

for kind in (LocalEngine, DeepSpeedEngine):
    spoil(kind)
"""
"""A prelude: the gradients of some samples are ten thousand times what they are."""

UPLOADS_AT_ONCE = """
from llmtrain.checkpoint.uploader import Uploader

submit = Uploader.submit

def at_once(self, path):
    submit(self, path)
    assert self.wait(60)

Uploader.submit = at_once
"""
"""A prelude: training waits for each upload."""


def arguments(corpus: Path, run: Path, *overrides: str) -> list[str]:
    return [
        *("train", *TINY_GPT, "train.steps=12", "checkpoint.every=3", "evaluation.every=6"),
        "evaluation.max_samples=16",
        *("train.spikes.window=4", "train.spikes.deviations=50", "train.spikes.in_a_row=2"),
        *(f"data.path={corpus}", f"run.dir={run}", *overrides),
    ]


@pytest.fixture
def spoiled(tmp_path: Path) -> dict[str, str]:
    """The environment in which the samples of steps 8 and 9 are spoiled."""
    prelude = tmp_path / "prelude.py"
    prelude.write_text(SPOILS.format(first=7 * SIZE, last=9 * SIZE))
    return {PRELUDE: str(prelude)}


def metrics(run: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]


def curve(run: Path) -> list[tuple[Any, ...]]:
    """What training computed, step after step."""
    return [
        (m["step"], m["loss"], m["grad_norm"], m["data_digest"], m.get("rejected"))
        for m in metrics(run)
        if "loss" in m
    ]


def last_files(run: Path) -> list[Any]:
    files = Checkpoint.open(list_steps(run / "checkpoints")[-1]).manifest["files"]
    assert isinstance(files, list)
    return files


def run_ranks(size: int, command: list[str], environment: dict[str, str]) -> str:
    done = on_ranks(size, *command, **environment)
    assert [rank.returncode for rank in done] == [0] * size, done[0].stderr
    return done[0].stderr


def killed_and_resumed(size: int, command: list[str], run: Path, environment: dict[str, str]) -> None:
    """Kill all ranks at some moment after the first checkpoint, and run the command again."""
    ranks = start_ranks(size, *command, **environment)
    step = random.SystemRandom().randint(4, 11)
    while (
        not (run / "metrics.jsonl").exists() or f'"step": {step},' not in (run / "metrics.jsonl").read_text()
    ):
        if ranks[0].poll() is not None:
            break
        time.sleep(0.002)
    for rank in ranks:
        rank.kill()
    finish(ranks)
    run_ranks(size, command, environment)


def test_a_spike_is_skipped(corpus: Path, tmp_path: Path, spoiled: dict[str, str]):
    whole, run = tmp_path / "whole", tmp_path / "run"
    skip = ("train.on_spike=skip", "train.spikes.in_a_row=3")
    said = run_ranks(1, arguments(corpus, whole, *skip), spoiled)
    assert "step 8: skipped: gradient norm" in said
    assert [step for step, *_, rejected in curve(whole) if rejected] == [8, 9]
    killed_and_resumed(1, arguments(corpus, run, *skip), run, spoiled)
    assert curve(run) == curve(whole)
    assert last_files(run) == last_files(whole)
    traced = llmtrain("data", "trace", f"run={run}", "step=8:10")
    assert traced.returncode == 0, traced.stdout
    assert "step 8: not taken: gradient norm" in traced.stdout
    assert "step 10: not taken" not in traced.stdout


@pytest.mark.in_turns(2)
@pytest.mark.parametrize(("size", "overrides"), [(1, ()), (2, ("parallel.zero=1",))])
def test_a_run_goes_back(
    corpus: Path, tmp_path: Path, spoiled: dict[str, str], size: int, overrides: tuple[str, ...]
):
    whole, run = tmp_path / "whole", tmp_path / "run"
    back = ("train.on_spike=rollback", *overrides)
    said = run_ranks(size, arguments(corpus, whole, *back), spoiled)
    assert "step 9: back to the checkpoint of step 6, without samples 48 to 71: 2 bad steps in a row" in said
    assert [step for step, *_ in curve(whole)] == list(range(1, 13))
    assert not any(rejected for *_, rejected in curve(whole))
    assert [event.step for event in read_events(whole / EVENTS) if event.kind == "rollback"] == [6]
    killed_and_resumed(size, arguments(corpus, run, *back), run, spoiled)
    assert curve(run) == curve(whole)
    assert last_files(run) == last_files(whole)
    traced = llmtrain("data", "trace", f"run={run}", "step=6:8")
    assert traced.returncode == 0, traced.stdout  # as recorded
    assert "step 7: samples 48 to 71 before it were left out" in traced.stdout
    assert "not taken" not in traced.stdout


def test_a_run_that_goes_back_takes_its_copy_with_it(corpus: Path, tmp_path: Path, spoiled: dict[str, str]):
    """Also where a checkpoint that was saved between the bad steps is elsewhere already."""
    with open(spoiled[PRELUDE], "a") as prelude:
        prelude.write(UPLOADS_AT_ONCE)
    run, copy = tmp_path / "run", tmp_path / "copy"
    back = ("train.on_spike=rollback", "checkpoint.every=2", "checkpoint.keep_last=9")
    said = run_ranks(1, arguments(corpus, run, *back, f"checkpoint.remote=file://{copy}"), spoiled)
    assert "step 9: back to the checkpoint of step 6, without samples 48 to 71" in said
    assert "set aside step-00000008" in said
    assert "fetching" not in said
    assert said.count(": back to the checkpoint of step") == 1
    steps = [Checkpoint.open(path).step for path in list_steps(copy / "checkpoints")]
    assert steps == [2, 4, 6, 8, 10, 12]
    assert last_files(copy) == last_files(run)
    manifest = Checkpoint.open(list_steps(copy / "checkpoints")[3]).manifest
    assert manifest["spikes"]["rollbacks"] == 1


@pytest.mark.in_turns(3)
@pytest.mark.parametrize(
    ("overrides", "words"),
    [
        (("train.on_spike=stop",), ("step 8: got gradient norm", "deviations above the mean")),
        (("train.on_spike=skip",), ("step 9", "after 1 more bad steps in a row")),
        (("train.on_spike=rollback", "checkpoint.every=10"), ("no checkpoint of step 7 or before",)),
    ],
)
def test_a_run_that_cannot_go_on(
    corpus: Path, tmp_path: Path, spoiled: dict[str, str], overrides: tuple[str, ...], words: tuple[str, ...]
):
    done = llmtrain(*arguments(corpus, tmp_path / "run", *overrides), **spoiled)
    [line] = [line for line in done.stderr.splitlines() if line.startswith("llmtrain: error: ")]
    assert done.returncode == 2
    for word in words:
        assert word in line
