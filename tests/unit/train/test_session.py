"""A start of a run, from its configuration to its last checkpoint, with an engine that computes nothing: in
which order things happen, and what a later start makes of them."""

from __future__ import annotations

import json
import logging
import math
import shutil
from pathlib import Path
from typing import Any

import pytest

from llmtrain.checkpoint.reader import Checkpoint
from llmtrain.checkpoint.retention import list_steps
from llmtrain.engine.gate import NonFiniteError
from llmtrain.errors import CheckpointError, Problem, TrainingError
from llmtrain.track.trackers import Trackers
from llmtrain.train import run_record
from tests.support.fake_engine import FakeRun, raise_at, stop_at, trained

EVALUATION = [f"evaluate batch {number}" for number in (1, 2, 3, 4)]
STEPS = [f"train {start}:{start + 8}" for start in range(0, 48, 8)]
"""What the engine is asked for each of six steps."""


@pytest.fixture
def run(corpus: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> FakeRun:
    return FakeRun(corpus, tmp_path / "run", monkeypatch)


@pytest.fixture(scope="module")
def finished(corpus: Path, tmp_path_factory: pytest.TempPathFactory) -> FakeRun:
    with pytest.MonkeyPatch.context() as patch:
        run = FakeRun(corpus, tmp_path_factory.mktemp("finished"), patch)
        assert run.start()
    return run


@pytest.fixture
def whole(finished: FakeRun, corpus: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> FakeRun:
    """A run that nothing disturbed, to do with as a test likes."""
    run = FakeRun(corpus, tmp_path / "whole", monkeypatch)
    shutil.copytree(finished.folder, run.folder, symlinks=True)
    run.calls += finished.calls
    return run


def metrics(run: FakeRun) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (run.folder / "metrics.jsonl").read_text().splitlines()]


def curve(run: FakeRun) -> list[tuple[Any, ...]]:
    """What each step's metrics say of state and data; not what the clock says."""
    keys = ("step", "loss", "lr", "data_digest", "num_targets")
    return [tuple(record[key] for key in keys) for record in metrics(run) if "loss" in record]


def evaluations(run: FakeRun) -> list[tuple[int, float]]:
    return [(r["step"], r["validation_loss"]) for r in metrics(run) if "validation_loss" in r]


def checkpoints(run: FakeRun) -> dict[int, Checkpoint]:
    found = [Checkpoint.open(path) for path in list_steps(run.folder / "checkpoints")]
    return {checkpoint.step: checkpoint for checkpoint in found}


def assert_same(run: FakeRun, whole: FakeRun) -> None:
    """What two runs came to: the same curve, evaluations, samples and final state."""
    assert curve(run) == curve(whole)
    assert evaluations(run) == evaluations(whole)
    ours, theirs = checkpoints(run)[6], checkpoints(whole)[6]
    assert ours.manifest["files"] == theirs.manifest["files"]  # by checksum
    assert ours.manifest["timeline"] == theirs.manifest["timeline"]
    assert ours.manifest["validation_loss"] == theirs.manifest["validation_loss"]


def test_undisturbed(whole: FakeRun):
    assert whole.calls == [*STEPS[:3], *EVALUATION, *STEPS[3:], *EVALUATION]
    assert list(checkpoints(whole)) == [2, 4, 6]
    assert [step for step, *_ in curve(whole)] == [1, 2, 3, 4, 5, 6]
    assert [step for step, _ in evaluations(whole)] == [3, 6]
    of_manifests = {step: c.manifest["validation_loss"] for step, c in checkpoints(whole).items()}
    assert of_manifests == {2: None, 4: None, 6: evaluations(whole)[1][1]}


def test_an_evaluation_at_the_start_comes_before_the_first_step_alone(run: FakeRun):
    assert not run.start("evaluation.at_start=true", "evaluation.every=null", on_call=stop_at(STEPS[1]))
    assert run.calls == [*EVALUATION, *STEPS[:2]]
    run.calls.clear()
    assert run.start("evaluation.at_start=true", "evaluation.every=null")
    assert run.calls == [*STEPS[1:], *EVALUATION]


@pytest.mark.parametrize("step", range(1, 6))
def test_a_stop_in_mid_run_loses_nothing(run: FakeRun, whole: FakeRun, step: int):
    """The step under way is abandoned, and what was done before it is saved."""
    assert not run.start(on_call=stop_at(STEPS[step]))
    assert max(checkpoints(run)) == step
    assert run.start()
    assert list(trained(run.calls)) == list(trained([*STEPS[: step + 1], *STEPS[step:]]))
    assert_same(run, whole)


@pytest.mark.parametrize("step", range(6))
def test_a_crash_loses_the_steps_since_the_last_checkpoint(run: FakeRun, whole: FakeRun, step: int):
    with pytest.raises(RuntimeError, match="crash"):
        run.start(on_call=raise_at(STEPS[step], RuntimeError("crash")))
    saved = max(checkpoints(run), default=0)
    assert saved in {step - step % 2, max(0, step - step % 2 - 2)}, "the last one may not be complete yet"
    run.calls.clear()
    assert run.start()
    assert list(trained(run.calls)) == list(trained(STEPS[saved:]))
    assert_same(run, whole)


def test_an_evaluation_that_is_cut_is_owed(run: FakeRun, whole: FakeRun):
    assert not run.start(on_call=stop_at(EVALUATION[1]))
    assert run.calls == [*STEPS[:3], *EVALUATION[:2]]
    assert evaluations(run) == [], "half an evaluation"
    assert checkpoints(run)[3].manifest["evaluation_owed"]
    run.calls.clear()
    assert run.start()
    assert run.calls == [*EVALUATION, *STEPS[3:], *EVALUATION]
    noted = checkpoints(run)[3].manifest
    assert (noted["validation_loss"], noted["evaluation_owed"]) == (evaluations(whole)[0][1], False)
    assert_same(run, whole)


def test_a_loss_that_is_not_finite_keeps_the_last_checkpoint(run: FakeRun, whole: FakeRun):
    error = NonFiniteError(f"loss {math.nan}", range(32, 40))
    with pytest.raises(TrainingError, match=r"step 5: got loss nan in 8 samples, numbers 32 to 39") as caught:
        run.start(on_call=raise_at(STEPS[4], error))
    assert "the checkpoint of step 4 is kept" in str(caught.value)
    assert list(checkpoints(run)) == [2, 4]
    assert [step for step, *_ in curve(run)] == [1, 2, 3, 4]
    assert run.start()
    assert_same(run, whole)


class FailsAt:
    """A tracker that fails from a step on."""

    def __init__(self, step: int, error: Exception) -> None:
        self._step, self._error = step, error

    def log(self, step: int, metrics: object) -> None:
        if step >= self._step:
            raise self._error

    def state(self) -> dict[str, Any]:
        return {}

    def keep(self, step: int, checkpoint: Path) -> None:
        pass

    def close(self, failed: bool) -> None:
        pass


def track_besides(tracker: FailsAt, monkeypatch: pytest.MonkeyPatch) -> None:
    """Let later starts open this tracker beside those of the settings."""
    original = run_record.open_trackers

    def opened(*arguments: Any, **settings: Any) -> Trackers:
        trackers = original(*arguments, **settings)
        trackers.open("besides", lambda: tracker)
        return trackers

    monkeypatch.setattr(run_record, "open_trackers", opened)


def test_a_tracker_that_fails_does_not_stop_training(
    run: FakeRun, whole: FakeRun, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
):
    track_besides(FailsAt(2, ConnectionError("no network")), monkeypatch)
    with caplog.at_level(logging.WARNING):
        assert run.start()
    assert [record.message for record in caplog.records if "track.besides" in record.message] == [
        "track.besides failed, training continues: ConnectionError: no network"
    ]
    assert_same(run, whole)


def test_metrics_that_cannot_be_written_stop_the_run_with_a_checkpoint(
    run: FakeRun, whole: FakeRun, monkeypatch: pytest.MonkeyPatch
):
    with monkeypatch.context() as patches:
        track_besides(FailsAt(3, TrainingError(Problem("metrics.jsonl", "a full disk"))), patches)
        with pytest.raises(TrainingError, match="a full disk"):
            run.start()
    assert max(checkpoints(run)) == 3
    assert not list((run.folder / "checkpoints").glob(".*partial"))
    assert run.start()
    assert_same(run, whole)


def test_a_run_that_is_done_trains_no_more(whole: FakeRun, capsys: pytest.CaptureFixture[str]):
    before, calls = metrics(whole), list(whole.calls)
    assert whole.start()
    assert whole.calls == calls
    assert metrics(whole) == before
    assert "already at step 6 of 6: nothing to train" in capsys.readouterr().err
    assert whole.start("train.steps=8")
    assert list(trained(whole.calls[len(calls) :])) == ["48:56", "56:64"]


def test_going_back_sets_later_checkpoints_aside(whole: FakeRun, capsys: pytest.CaptureFixture[str]):
    expected = curve(whole)
    whole.calls.clear()
    resume = f"checkpoint.resume={whole.folder / 'checkpoints/step-00000002'}"
    assert whole.start(resume)
    assert list(trained(whole.calls)) == list(trained(STEPS[2:]))
    assert curve(whole) == expected
    assert "set aside step-00000006" in capsys.readouterr().err
    assert whole.start(resume), "goes on, and does not go back again"
    assert "already at step 6" in capsys.readouterr().err


def test_going_back_moves_nothing_before_it_is_refused(whole: FakeRun):
    resume = f"checkpoint.resume={whole.folder / 'checkpoints/step-00000002'}"
    with pytest.raises(CheckpointError, match="another model"):
        whole.start(resume, "model.hidden_size=64")
    assert list(checkpoints(whole)) == [2, 4, 6]


def test_a_fork_begins_with_metrics_of_its_own(run: FakeRun, whole: FakeRun):
    assert run.start(f"checkpoint.resume={whole.folder / 'checkpoints/step-00000004'}")
    assert list(trained(run.calls)) == list(trained(STEPS[4:]))
    assert curve(run) == curve(whole)[4:]
    assert "step-00000004" in checkpoints(run)[6].manifest["resumed_from"]


@pytest.mark.parametrize(
    ("overrides", "said"),
    [
        (["model.hidden_size=64"], r"another model \(model.hidden_size=64 here, 32 there\)"),
        (["optimizer=sgd"], "optimizer: got 'sgd' over a checkpoint of 'adamw'"),
        (["checkpoint.resume=never"], "run.dir: got .*; allowed: no run; use checkpoint.resume=auto"),
    ],
)
def test_what_a_run_cannot_go_on_with_is_refused(whole: FakeRun, overrides: list[str], said: str):
    calls, held = list(whole.calls), list(checkpoints(whole))
    with pytest.raises(CheckpointError, match=said):
        whole.start("train.steps=9", *overrides)
    assert whole.calls == calls
    assert list(checkpoints(whole)) == held


def test_a_damaged_checkpoint_is_passed_over(whole: FakeRun, capsys: pytest.CaptureFixture[str]):
    expected = curve(whole)
    for step in (6, 4):
        (checkpoints(whole)[step].path / "rank-00000.safetensors").write_bytes(b"cut")
    whole.calls.clear()
    assert whole.start()
    said = capsys.readouterr().err
    assert "damaged checkpoint passed over: step-00000006" in said
    assert "damaged checkpoint passed over: step-00000004" in said
    assert list(trained(whole.calls)) == list(trained(STEPS[2:]))
    assert curve(whole) == expected


def test_a_damaged_newer_checkpoint_does_not_outrank_a_new_one(whole: FakeRun):
    (checkpoints(whole)[6].path / "rank-00000.safetensors").write_bytes(b"cut")
    rules = ("checkpoint.every=1", "checkpoint.keep_last=1", "checkpoint.keep_best=0")
    assert whole.start("train.steps=5", *rules)
    assert list(checkpoints(whole)) == [5]
    assert list_steps(whole.folder / "checkpoints" / "superseded")


def test_only_damaged_checkpoints_are_refused(whole: FakeRun):
    for checkpoint in checkpoints(whole).values():
        (checkpoint.path / "rank-00000.safetensors").write_bytes(b"cut")
    with pytest.raises(CheckpointError, match="only damaged checkpoints"):
        whole.start()
