"""Samples of text at evaluations: in the run folder and the trackers, and a run that is the same without."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from llmtrain.errors import ConfigError
from llmtrain.train.resolve import resolve
from tests.support import warm
from tests.support.training import TINY_GPT, compose
from tests.unit.track.test_wandb import history

RUN = (
    *TINY_GPT,
    "train.steps=4",
    "evaluation.every=2",
    "evaluation.at_start=false",
    "evaluation.max_samples=4",
    "model.dropout=0.1",
    "exact_dropout=false",
)
TRACKED = ("evaluation.texts=2", "track=[jsonl,tensorboard,wandb]")


def losses(run: Path) -> list[tuple[Any, ...]]:
    found = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    return [(r["step"], r.get("loss"), r.get("validation_loss")) for r in found]


def samples(run: Path, step: int) -> list[dict[str, Any]]:
    lines = (run / "samples" / f"step-{step:08d}.jsonl").read_text().splitlines()
    return [json.loads(line) for line in lines]


@pytest.mark.slow
def test_samples_are_left_and_tracked_and_the_run_is_the_same(corpus: Path, tmp_path: Path):
    words = [*RUN, f"data.path={corpus}"]
    plain, run = tmp_path / "plain", tmp_path / "run"
    for folder, options in ((plain, ()), (run, TRACKED)):
        done = warm.llmtrain("train", *words, *options, f"run.dir={folder}", WANDB_MODE="offline")
        assert done.returncode == 0, done.stderr
    assert losses(run) == losses(plain)

    left = samples(run, 4)
    assert [list(sample) for sample in left] == [["step", "beginning", "continuation"]] * 2
    assert all(sample["step"] == 4 and sample["beginning"] for sample in left)
    assert any(sample["continuation"] for sample in left)

    of_step = {record["step"]: record for record in history(run)}
    [file] = run.glob(f"wandb/offline-run-*/files/{of_step[4]['texts.path']}")
    table = json.loads(file.read_text())
    assert table["columns"] == ["step", "beginning", "continuation"]
    assert table["data"] == [list(sample.values()) for sample in left]
    assert "texts.path" in of_step[2]

    events = EventAccumulator(str(run / "tensorboard"))
    events.Reload()
    shown = {event.step: event for event in events.Tensors("texts/text_summary")}
    assert sorted(shown) == [2, 4]
    assert left[0]["beginning"].splitlines()[0] in shown[4].tensor_proto.string_val[0].decode()


@pytest.mark.slow
def test_two_ranks_write_the_same(corpus: Path, tmp_path: Path):
    words = [*RUN, f"data.path={corpus}", "evaluation.texts=3", "exact_dropout=true", "train.steps=2"]
    found = []
    for size, layout in ((1, ()), (2, ()), (2, ("parallel.tensor=2",))):
        run = tmp_path / f"{size}{len(layout)}"
        done = warm.on_ranks(size, "train", *words, *layout, f"run.dir={run}")
        assert all(each.returncode == 0 for each in done), done[0].stderr
        found.append(samples(run, 2))
    assert len(found[0]) == 3
    assert found[1] == found[0] == found[2]


@pytest.mark.parametrize(
    ("changes", "size", "message"),
    [
        (["evaluation.texts=65"], 1, "evaluation.texts: got 65; allowed: 0 to 64"),
        (["evaluation.every=null"], 1, "evaluation.texts: got 2 with evaluation.every=null"),
        (["model=bert_tiny"], 1, "evaluation.texts: got 2 with objective=mlm; allowed: 0, or a model"),
        (["parallel.zero=3"], 2, "evaluation.texts: got 2 with parallel.zero=3; allowed: 0: texts"),
        (["parallel.sequence=2"], 2, "evaluation.texts: got 2 with parallel.sequence=2"),
    ],
)
def test_refusals(changes: list[str], size: int, message: str, corpus: Path):
    words = [*RUN, f"data.path={corpus}", "evaluation.texts=2", "exact_dropout=true", *changes]
    if "model=bert_tiny" in changes:
        words.remove("model=gpt_tiny")
    with pytest.raises(ConfigError, match=message) as caught:
        resolve(compose(words), size)
    assert len(caught.value.problems) == 1
