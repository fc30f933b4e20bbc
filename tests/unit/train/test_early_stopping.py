"""A run ends when its figures no longer get better, whenever it was stopped before, and keeps its best."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import pytest

from llmtrain.checkpoint import retention
from llmtrain.checkpoint.reader import Checkpoint
from llmtrain.errors import CheckpointError, ConfigError
from llmtrain.train.early_stopping import EarlyStoppingConfig, History
from tests.support.fake_engine import FakeRun, raise_at, stop_at, trained

STEPS = [f"train {start}:{start + 8}" for start in range(0, 48, 8)]
IMPATIENT = (
    "evaluation.every=1",
    "checkpoint.every=null",
    "early_stopping.metric=loss",
    "early_stopping.patience=2",
    "early_stopping.min_delta=1e9",
)
"""No evaluation is ever better by so much: of six steps the run makes three."""


def history(metric: str, *values: float) -> History:
    found = History(metric)
    for step, value in enumerate(values, 1):
        found.note(step, {metric: value})
    return found


@pytest.mark.parametrize(
    ("metric", "values", "min_delta", "waited", "best"),
    [
        ("accuracy", (0.5, 0.6, 0.6, 0.59), 0.0, 2, 2),
        ("accuracy", (0.5, 0.6, 0.7), 0.0, 0, 3),
        ("accuracy", (0.5, 0.55, 0.58, 0.62), 0.1, 0, 4),  # better than the reference in three small steps
        ("accuracy", (0.5, 0.55, 0.58), 0.1, 2, 3),
        ("loss", (2.0, 1.0, 1.5), 0.0, 1, 2),
        ("mean_squared_error", (2.0, 3.0), 0.0, 1, 1),
        ("pearson", (math.nan, math.nan, 0.1, math.nan), 0.0, 1, 3),
        ("pearson", (math.nan, math.nan), 0.0, 1, None),
    ],
)
def test_what_is_waited_for(
    metric: str, values: tuple[float, ...], min_delta: float, waited: int, best: int | None
) -> None:
    found = history(metric, *values)
    assert found.waited(min_delta) == waited
    assert found.best_step == best
    again = History.of(metric, json.loads(json.dumps(found.encode())))
    assert (again.steps, again.values, again.best) == (found.steps, found.values, found.best)
    assert found.ends(EarlyStoppingConfig(metric, max(1, waited), min_delta)) == (waited > 0)
    assert not found.ends(EarlyStoppingConfig(None, 1))
    assert History.of("another", found.encode()).steps == []


@pytest.fixture
def run(corpus: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> FakeRun:
    return FakeRun(corpus, tmp_path / "run", monkeypatch)


def manifests(run: FakeRun) -> dict[int, dict[str, Any]]:
    paths = retention.list_steps(run.folder / "checkpoints")
    return {checkpoint.step: checkpoint.manifest for checkpoint in map(Checkpoint.open, paths)}


def test_a_run_ends_early_once_for_all(run: FakeRun, capsys: pytest.CaptureFixture[str]) -> None:
    assert run.start(*IMPATIENT), "it is complete"
    assert list(trained(run.calls)) == list(trained(STEPS[:3]))
    said = capsys.readouterr().err
    assert "stopped early at step 3: no better loss in 2 evaluations; the best was loss" in said
    assert f"the best checkpoint is {run.folder}/best" in said
    assert run.start(*IMPATIENT)
    assert len(list(trained(run.calls))) == 3
    assert "stopped early at step 3" in capsys.readouterr().err
    # More patience goes on from there, to the last step, and remembers all evaluations.
    assert run.start(*IMPATIENT, "early_stopping.patience=9")
    assert list(trained(run.calls)) == list(trained(STEPS))
    assert manifests(run)[6]["evaluations"]["steps"] == [1, 2, 3, 4, 5, 6]


@pytest.mark.parametrize("call", [STEPS[1], STEPS[2], "evaluate batch 2", "evaluate batch 4"])
@pytest.mark.parametrize("kind", ["stop", "crash"])
def test_a_disturbed_run_ends_at_the_same_step(run: FakeRun, call: str, kind: str) -> None:
    error = RuntimeError("crash")
    if kind == "stop":
        assert not run.start(*IMPATIENT, on_call=stop_at(call))
    else:
        with pytest.raises(RuntimeError, match="crash"):
            run.start(*IMPATIENT, on_call=raise_at(call, error))
    assert run.start(*IMPATIENT)
    record = manifests(run)[3]["evaluations"]
    assert record["steps"] == [1, 2, 3]
    assert max(manifests(run)) == 3
    lines = [json.loads(line) for line in (run.folder / "metrics.jsonl").read_text().splitlines()]
    assert record["values"] == [line["validation_loss"] for line in lines if "validation_loss" in line]


def test_the_best_evaluation_has_a_checkpoint_that_is_kept(
    run: FakeRun, capsys: pytest.CaptureFixture[str]
) -> None:
    more = ("evaluation.every=1", "checkpoint.every=null", "checkpoint.keep_last=1", "checkpoint.best=loss")
    assert run.start(*more)
    values = manifests(run)[6]["evaluations"]["values"]
    best = 1 + values.index(min(values))
    kept = manifests(run)
    assert set(kept) == {best, 6}
    assert kept[best]["validation"] == {"loss": min(values)}
    assert retention.find(run.folder / "best", print).step == best
    assert json.loads((run.folder / "figures.json").read_text())["best"]["step"] == best


def test_checkpoints_from_before_are_ranked_by_their_loss(run: FakeRun) -> None:
    from llmtrain import files

    assert run.start("checkpoint.every=3")
    for path in retention.list_steps(run.folder / "checkpoints"):
        manifest = Checkpoint.open(path).manifest
        del manifest["evaluations"], manifest["validation"]
        manifest["checksum"] = files.checksum_of_json(manifest)
        files.write_json_atomically(path / "manifest.json", manifest)
    losses = {step: manifest["validation_loss"] for step, manifest in manifests(run).items()}
    assert len(losses) == 2
    found = retention.best_of(run.folder)
    assert found is not None
    assert Checkpoint.open(found.path).step == min(losses, key=lambda step: losses[step])


def test_no_best_without_evaluations(run: FakeRun) -> None:
    assert run.start("evaluation.every=null")
    with pytest.raises(CheckpointError, match="no checkpoint with validation figures"):
        retention.find(run.folder / "best", print)


@pytest.mark.parametrize(
    ("more", "said"),
    [
        (["early_stopping.metric=f1_macro"], "early_stopping.metric: got f1_macro; allowed: loss, with"),
        (
            ["checkpoint.best=accuracy"],
            "checkpoint.best: got accuracy; allowed: loss, with objective=causal_lm",
        ),
        (
            ["early_stopping.metric=loss", "evaluation.every=null"],
            "early_stopping.metric: got loss with evaluation.every=null",
        ),
        (["early_stopping.patience=0"], "early_stopping.patience: got 0; allowed: 1 or more"),
        (["early_stopping.min_delta=-1"], "early_stopping.min_delta: got -1.0; allowed: 0 or more"),
    ],
)
def test_a_wrong_metric_is_refused_before_the_run(run: FakeRun, more: list[str], said: str) -> None:
    with pytest.raises(ConfigError) as caught:
        run.start(*more)
    assert said in str(caught.value)
    assert not run.folder.exists()
