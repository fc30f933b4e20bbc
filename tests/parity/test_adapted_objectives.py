"""Several tasks, and prompts, with LoRA and adapters: resumed bit by bit, alike on two ranks, merged."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from llmtrain.checkpoint.reader import Checkpoint
from llmtrain.cli import main as cli
from tests.parity.matrix import TOLERANCES, deviation
from tests.support.tables import rows
from tests.support.training import train

pytestmark = pytest.mark.slow

__all__ = ["rows"]
STEPS, SAVED = 4, 2
SIZE = ("model=bert_tiny", "model.num_layers=2", "model.hidden_size=32", "model.num_heads=4")
BATCH = ("batch.global_size=8", "batch.micro_size=2", "batch.sequence_length=48", "seed=7")
METHODS = {
    "lora": ("method=lora", "lora.rank=4", "lora.dropout=0.1"),
    "adapter": ("method=adapter", "adapter.width=6"),
}
PROMPT = ("objective=prompted", "objective.template={text} it was {answer}.")
OBJECTIVES = {
    "multi_task": (
        "objective=multi_task",
        "objective.tasks.label.kind=classification",
        "objective.tasks.tags.kind=tagging",
        "objective.balance=uncertainty",
        "data=tasks",
        "data.tasks.label.split.validation=0.2",
        "data.tasks.tags.text_field=words",
        "data.tasks.tags.label_field=tags",
    ),
    "prompted": (*PROMPT, "objective.verbalizer={0: a, 1: the, 2: and}", "data=table"),
}


@pytest.fixture(scope="module")
def trunk(corpus: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("trunk")
    train(1, (*SIZE, *BATCH, "objective=mlm", f"data.path={corpus}"), 1, save_to=folder)
    return folder / "step-00000001"


def settings(objective: str, method: str, rows: Path, corpus: Path, trunk: Path, cache: Path) -> list[str]:
    tables = [f"data.tasks.{name}.path={rows}" for name in ("label", "tags")]
    paths = tables if objective == "multi_task" else [f"data.path={rows}", "data.split.validation=0.2"]
    return [
        *(
            "model=pretrained",
            f"model.path={trunk}",
            *OBJECTIVES[objective],
            *METHODS[method],
            *BATCH,
            *paths,
        ),
        *(f"data.tokenizer={corpus}", f"data.cache.dir={cache}", "optimizer.lr=3e-3", "train.steps=20"),
    ]


@pytest.mark.in_turns(2)
@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("objective", OBJECTIVES)
def test_two_ranks_equal_one_and_a_resume_is_bit_exact(
    objective: str, method: str, rows: Path, corpus: Path, trunk: Path, tmp_path: Path
) -> None:
    words = settings(objective, method, rows, corpus, trunk, tmp_path / "tables")
    [whole] = train(1, words, STEPS, save_to=tmp_path, save_at=SAVED)
    checkpoint = Checkpoint.open(tmp_path / f"step-{SAVED:08d}")
    [rest] = train(1, words, STEPS, resume_from=checkpoint.path)
    assert rest.losses == whole.losses[SAVED:]
    for name, weight in whole.weights.items():
        assert np.array_equal(rest.weights[name], weight), name
        trains = f".{method}." in name or (objective == "multi_task" and name.startswith("head."))
        assert (name not in checkpoint.frozen) == trains, name
        assert trains or np.array_equal(whole.initial_weights[name], weight), name
    for trace in train(2, (*words, "parallel.zero=2"), STEPS):
        found = deviation(trace, whole)
        assert found.within(TOLERANCES["fp32"]), found


def probabilities(checkpoint: Path, rows: Path, output: Path, *more: str) -> Any:
    words = [f"checkpoint={checkpoint}", f"input={rows}", f"output={output}", "sequence_length=48", *more]
    assert cli.run_verb("predict", words) == 0
    return [json.loads(line)["probability"] for line in output.read_text().splitlines()]


@pytest.mark.parametrize("objective", OBJECTIVES)
def test_the_merged_folder_predicts_the_same(
    objective: str, rows: Path, corpus: Path, trunk: Path, tmp_path: Path
) -> None:
    words = settings(objective, "lora", rows, corpus, trunk, tmp_path / "tables")
    run, merged = tmp_path / "run", tmp_path / "merged"
    steps = ["train.epochs=null", "train.steps=3", "schedule=constant", "schedule.warmup_steps=0"]
    ends = [f"run.dir={run}", "optimizer.lr=0.05", "evaluation.every=null", *steps]
    assert cli.run_verb("finetune", [word for word in words if "train.steps" not in word] + ends) == 0
    task = ["task=label"] if objective == "multi_task" else []
    assert cli.run_verb("export", [f"checkpoint={run}", f"output={merged}", *task]) == 0
    ours = probabilities(run, rows, tmp_path / "ours.jsonl", *task)
    # The folder does not say by which prompt it was trained.
    of_folder = OBJECTIVES["prompted"][:-1] if objective == "prompted" else ()
    theirs = probabilities(merged, rows, tmp_path / "theirs.jsonl", *of_folder)
    np.testing.assert_allclose(theirs, ours, atol=1e-5)
    assert np.ptp(ours) > 1e-3
