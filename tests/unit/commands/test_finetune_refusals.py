"""What does not fit a fine-tuned model: one line, exit code 2, and nothing written."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from llmtrain.cli import main as cli
from llmtrain.nn.task_config import TaskHeadConfig
from llmtrain.objectives.classification import ClassificationConfig

ROWS = [{"text": f"a film of {number} men", "label": "ab"[number % 2]} for number in range(60)]
SIZES = ("model=bert_tiny", "model.num_layers=1", "model.hidden_size=16", "model.num_heads=2")


def write(path: Path, rows: list[dict[str, Any]]) -> Path:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def words(rows: Path, folder: Path, *more: str) -> list[str]:
    given = {word.split("=")[0] for word in more}
    usual = [
        *("objective=classification", f"data.path={rows}", f"data.cache.dir={rows.parent / 'cache'}"),
        *("data.split.validation=0.2", "batch.global_size=8", "batch.sequence_length=16"),
        *("train.epochs=null", "train.steps=2", "evaluation.every=null", f"run.dir={folder}"),
    ]
    return [*(word for word in usual if word.split("=")[0] not in given), *more]


@pytest.fixture(scope="module")
def rows(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write(tmp_path_factory.mktemp("rows") / "rows.jsonl", ROWS)


@pytest.fixture(scope="module")
def run(rows: Path, corpus: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("refusals") / "run"
    assert cli.run_verb("finetune", words(rows, folder, *SIZES, f"data.tokenizer={corpus}")) == 0
    return folder


def error(capsys: pytest.CaptureFixture[str], verb: str, arguments: list[str]) -> str:
    capsys.readouterr()
    assert cli.run_verb(verb, arguments) == 2
    said = capsys.readouterr().err
    assert "Traceback" not in said
    [line] = [line for line in said.splitlines() if line.startswith("llmtrain: error")]
    return line


def test_a_head_of_another_label_list(
    run: Path, rows: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    others = write(tmp_path / "others.jsonl", [{**row, "label": f"not {row['label']}"} for row in ROWS])
    start = [f"model.path={run}"]
    said = error(capsys, "finetune", words(others, tmp_path / "run", *start))
    assert "got the labels not a, not b; allowed: a, b, as objective.labels or the model's head has" in said
    for labels in ("[a,b,c]", "[b,a]"):
        more = [*start, f"objective.labels={labels}"]
        said = error(capsys, "finetune", words(rows, tmp_path / "run", *more))
        assert "objective.labels: got" in said
        assert "allowed: a, b, as the model's head has them, in this order" in said
    said = error(capsys, "evaluate", [f"checkpoint={run}", f"data.test={others}", "split=test"])
    assert "others.jsonl line 1: got the label not a in the test split; allowed: a, b" in said
    assert not (tmp_path / "run").exists()


def test_labels_that_nobody_has_named_take_the_names_that_are_given() -> None:
    head = TaskHeadConfig("classes", outputs=2, labels=("LABEL_0", "LABEL_1"))
    named = ClassificationConfig(labels=("bad", "good"))
    assert named.head_of(head, None) == replace(head, labels=("bad", "good"))


def test_another_tokenizer(run: Path, rows: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    import sentencepiece

    text = tmp_path / "text"
    text.write_text("\n".join(row["text"] for row in ROWS))
    sentencepiece.SentencePieceTrainer.train(
        input=str(text),
        model_prefix=str(tmp_path / "other"),
        vocab_size=30,
        hard_vocab_limit=False,
        minloglevel=2,
    )
    other = f"data.tokenizer={tmp_path}/other.model"
    said = error(capsys, "finetune", words(rows, tmp_path / "run", f"model.path={run}", other))
    assert "data.tokenizer: got another tokenizer" in said
    assert "leave it out: the model brings its own" in said
    assert "data.tokenizer: got another tokenizer" in error(capsys, "evaluate", [f"checkpoint={run}", other])
    assert not (tmp_path / "run").exists()


def test_rows_that_changed_since_the_run_began(
    corpus: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    own = write(tmp_path / "rows.jsonl", ROWS)
    arguments = words(own, tmp_path / "run", *SIZES, f"data.tokenizer={corpus}")
    assert cli.run_verb("finetune", arguments) == 0
    longer = [*arguments, "train.steps=4"]
    write(own, [*ROWS, *({"text": f"one more {n}", "label": "a"} for n in range(9))])
    said = error(capsys, "finetune", longer)
    assert "data.path: got" in said
    assert "whose rows to train on have changed since step 2 of" in said
    assert [path.name for path in (tmp_path / "run/checkpoints").glob("step-*")] == ["step-00000002"]
    write(own, ROWS)
    assert cli.run_verb("finetune", longer) == 0


def test_rows_to_evaluate_that_changed_since_the_run_began(
    corpus: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    own, held_out = write(tmp_path / "rows.jsonl", ROWS), write(tmp_path / "held_out.jsonl", ROWS[:4])
    files = [f"data.train={own}", f"data.validation={held_out}", "data.path=null", "evaluation.every=1"]
    arguments = words(own, tmp_path / "run", *SIZES, f"data.tokenizer={corpus}", *files)
    assert cli.run_verb("finetune", arguments) == 0
    longer = [*arguments, "train.steps=4"]
    write(held_out, ROWS[:6])
    said = error(capsys, "finetune", longer)
    assert "data.validation: got rows to evaluate that have changed since step 2 of" in said
    write(held_out, ROWS[:4])
    assert cli.run_verb("finetune", longer) == 0


def test_a_prediction_that_is_refused_leaves_nothing(
    run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    wrong = write(tmp_path / "in.jsonl", [{"text": "a film"}, {"txt": "a film"}])
    arguments = [f"checkpoint={run}", f"input={wrong}", f"output={tmp_path / 'out.jsonl'}"]
    assert "in.jsonl line 2: got no field text; allowed: txt" in error(capsys, "predict", arguments)
    assert [path.name for path in tmp_path.iterdir()] == ["in.jsonl"]
