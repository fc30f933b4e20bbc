"""`llmtrain finetune`: from a preset or a trained model and a file to figures on held-out rows."""

from __future__ import annotations

import csv
import json
import re
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from llmtrain.cli import main as cli

WORDS = ["the", "film", "was", "a", "fine", "old", "tale", "of", "two", "men", "and", "one", "dog"]
TINY = ("model.num_layers=2", "model.hidden_size=32", "model.num_heads=4", "model.dropout=0")
RECURRENT = ("rnn", "gru", "lstm", "bilstm", "attention_lstm")
SHORT = ("batch.global_size=16", "batch.micro_size=16", "batch.sequence_length=32", "optimizer.lr=3e-3")


@pytest.fixture(scope="module")
def reviews(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Texts with the word that decides their label, and the number of words as a grade."""
    draw = np.random.default_rng(0)
    path = tmp_path_factory.mktemp("reviews") / "reviews.csv"
    with open(path, "w", newline="") as file:
        writer = csv.writer(file)
        writer.writerow(["text", "label", "grade"])
        for number in range(400):
            good = number % 2
            words = [*draw.choice(WORDS, draw.integers(4, 14)), ("awful", "great")[good]]
            draw.shuffle(words)
            writer.writerow([" ".join(words), ("bad", "good")[good], len(words)])
    return path


def settings(reviews: Path, corpus: Path, tmp_path: Path, *more: str) -> list[str]:
    data = [f"data.path={reviews}", f"data.tokenizer={corpus}", f"data.cache.dir={tmp_path / 'cache'}"]
    if not any(word.startswith("objective=") for word in more):
        data.append("objective=classification")
    return [*data, "data.split.validation=0.2", f"run.dir={tmp_path / 'run'}", *SHORT, *more]


def figures(capsys: pytest.CaptureFixture[str], run: Path, *more: str) -> dict[str, Any]:
    capsys.readouterr()
    assert cli.run_verb("evaluate", [f"checkpoint={run}", "format=json", *more]) == 0
    found: dict[str, Any] = json.loads(capsys.readouterr().out)
    return found


@pytest.mark.in_turns(3)
@pytest.mark.parametrize("model", ["bert_tiny", "gpt_tiny", "xlnet_tiny", "t5_tiny", "bart_tiny", *RECURRENT])
def test_a_label_is_learned_and_scored(
    model: str, reviews: Path, corpus: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    tiny = [key for key in TINY if model not in RECURRENT or "heads" not in key]
    epochs = 6
    if model == "rnn":
        # The last state of a plain network forgets what stands far before it.
        tiny, epochs = [*tiny, "objective.pooling=mean"], 12
    words = settings(reviews, corpus, tmp_path, f"model={model}", *tiny, f"train.epochs={epochs}")
    assert cli.run_verb("finetune", words) == 0
    said = capsys.readouterr().err
    assert " rows (bad 1" in said
    found = figures(capsys, tmp_path / "run")
    assert found["accuracy"] > 0.9
    low, high = found["accuracy_interval"]
    assert low <= found["accuracy"] <= high
    assert found["targets"] > 50


def test_the_padding_that_is_said_is_that_of_the_batches(reviews: Path, corpus: Path, tmp_path: Path) -> None:
    from llmtrain.train.resolve import resolve
    from tests.support.training import compose, open_loader

    words = settings(reviews, corpus, tmp_path, "model=bert_tiny", "train.epochs=1")
    resolved = resolve(compose([*words, "data.workers=0"], "finetune"))
    loader = open_loader(resolved)
    micro_batches = [
        micro.batch
        for step, _ in zip(loader.steps(0), range(resolved.config.train.steps - 1), strict=False)
        for micro in step.micro_batches
    ]
    tokens = sum(int(batch["lengths"].sum()) for batch in micro_batches)
    positions = sum(batch["tokens"].numel() for batch in micro_batches)
    [said] = re.findall(r"([0-9.]+)% of a batch is padding", loader.stream.describe(16))
    assert float(said) / 100 == pytest.approx(1 - tokens / positions, abs=0.02)


def test_steps_of_epochs_and_a_resume(reviews: Path, corpus: Path, tmp_path: Path) -> None:
    words = settings(reviews, corpus, tmp_path, "model=bert_tiny", *TINY, "evaluation.every=null")
    assert cli.run_verb("finetune", [*words, "train.epochs=1"]) == 0
    steps = [json.loads(line) for line in (tmp_path / "run/metrics.jsonl").read_text().splitlines()]
    rows = 400 - 80
    assert abs(len(steps) - rows / 16) < 4
    assert cli.run_verb("finetune", [*words, "train.epochs=2"]) == 0
    assert len((tmp_path / "run/metrics.jsonl").read_text().splitlines()) == pytest.approx(
        2 * len(steps), abs=1
    )


def test_a_trained_model_is_the_trunk(
    reviews: Path, corpus: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    pretrain = [
        f"data.path={corpus}",
        f"run.dir={tmp_path / 'trunk'}",
        "model=bert_tiny",
        "objective=mlm_nsp",
    ]
    pretrain += [*TINY, *SHORT, "train.steps=2", "evaluation.every=null", "evaluation.at_start=false"]
    assert cli.run_verb("train", pretrain) == 0
    capsys.readouterr()
    words = settings(
        reviews, corpus, tmp_path, f"model.path={tmp_path / 'trunk'}", "train.epochs=1", "freeze=1"
    )
    words.remove(f"data.tokenizer={corpus}")
    assert cli.run_verb("finetune", words) == 0
    said = capsys.readouterr().err
    assert "new, started from the seed: head.out.weight (2 × 32), head.out.bias (2)" in said
    unused = said.split("unused of")[1].splitlines()[0]
    assert "pair_head.weight" in unused
    assert "pooler" not in unused, "it became the head's dense layer"
    found = figures(capsys, tmp_path / "run", f"data.path={reviews}")
    assert 0.3 < found["accuracy"] <= 1


def test_weights_near_their_start_over_stops_and_unfreezing(
    reviews: Path, tuned: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """A run that was stopped and one that was not end alike, without the folder that they began with; what is
    unfrozen later starts where it was."""
    import shutil

    from llmtrain.checkpoint.reader import Checkpoint

    data = [f"data.path={reviews}", f"data.cache.dir={tmp_path / 'cache'}", "objective=classification"]
    words = [*data, *SHORT, "method=gradual", "train.epochs=null", "evaluation.every=null", "seed=1"]
    words += ["transfer.l2_sp=0.5", "schedule=constant", "optimizer.weight_decay=0"]
    runs = {name: [*words, f"run.dir={tmp_path / name}"] for name in ("whole", "stopped")}
    shutil.copytree(tuned, tmp_path / "base" / "run")
    began = f"model.path={tmp_path / 'base' / 'run'}"
    assert cli.run_verb("finetune", [*runs["whole"], began, "train.steps=8", "gradual.every=2"]) == 0
    assert cli.run_verb("finetune", [*runs["stopped"], began, "train.steps=7", "gradual.every=2"]) == 0
    shutil.rmtree(tmp_path / "base")
    assert cli.run_verb("finetune", [*runs["stopped"], began, "train.steps=8", "gradual.every=2"]) == 0
    ends = {n: Checkpoint.open(tmp_path / n / "checkpoints/step-00000008") for n in runs}
    for name, weight in ends["whole"].weights().items():
        assert np.array_equal(weight, ends["stopped"].weights()[name]), name
    assert set(ends["whole"].manifest["tensors"]["optimizer.start"]) == set(ends["whole"].weights())
    plain = [word for word in runs["stopped"] if not word.startswith("transfer.")]
    other = [word.replace("stopped", "other") for word in plain]
    assert cli.run_verb("finetune", [*other, f"model.path={tuned}", "train.steps=8", "gradual.every=2"]) == 0
    capsys.readouterr()
    again = [*other, f"model.path={tuned}", "train.steps=9", "gradual.every=2", "transfer.l2_sp=0.5"]
    assert cli.run_verb("finetune", again) == 2
    assert "transfer.l2_sp: got 0.5 over a checkpoint without the values" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("more", "said"),
    [
        (["train.steps=3"], "train.steps: got 3 with method=gradual, which unfreezes 3 times; allowed: 4 or"),
        (["train.steps=9", "gradual.every=3"], "gradual.every: got 3, with which 3 of them take all 9 steps"),
    ],
)
def test_what_cannot_be_unfrozen(
    more: list[str], said: str, reviews: Path, tuned: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    data = [f"model.path={tuned}", f"data.path={reviews}", f"data.cache.dir={tmp_path / 'cache'}"]
    words = ["method=gradual", "train.epochs=null", f"run.dir={tmp_path / 'run'}", *SHORT, *data]
    assert cli.run_verb("finetune", [*words, "objective=classification", *more]) == 2
    lines = [line for line in capsys.readouterr().err.splitlines() if line.startswith("llmtrain: error")]
    assert len(lines) == 1
    assert said in lines[0]
    assert not (tmp_path / "run").exists()


def test_numbers_and_tags(
    corpus: Path, tmp_path: Path, reviews: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    task = ["objective=regression", "data.label_field=grade", "train.epochs=8"]
    words = settings(reviews, corpus, tmp_path, "model=bert_tiny", *TINY, *task)
    assert cli.run_verb("finetune", words) == 0
    assert figures(capsys, tmp_path / "run")["pearson"] > 0.5
    path = tmp_path / "tags.conll"
    rows = list(csv.DictReader(reviews.open()))
    works = {"film": "film\tB-WORK"}
    sentences = [[works.get(word, f"{word}\tO") for word in row["text"].split()] for row in rows]
    path.write_text("\n\n".join("\n".join(lines) for lines in sentences))
    task = ["objective=tagging", "data.text_field=tokens", "data.label_field=tags", "train.epochs=8"]
    words = settings(path, corpus, tmp_path, "model=bert_tiny", *TINY, *task)
    words.remove(f"run.dir={tmp_path / 'run'}")
    words.remove("batch.sequence_length=32")
    words += [f"run.dir={tmp_path / 'tagger'}", "batch.sequence_length=128"]
    assert cli.run_verb("finetune", words) == 0
    assert figures(capsys, tmp_path / "tagger")["entity_f1"] > 0.9


@pytest.mark.parametrize(
    ("more", "said"),
    [
        (["model=simple_cnn"], "objective: got classification with model.family=simple_cnn"),
        (["freeze=9"], "freeze: got 9; allowed: 0 to 2, the layers of the model"),
        (["data.text_field=txt"], "got no field txt; allowed: text, label, grade"),
        (["data.path=none.csv"], "none.csv): got no such file or folder"),
        (["data.tokenizer=null"], "data.tokenizer: got null"),
        (["train.epochs=0"], "train.epochs: got 0"),
        (["parallel.sequence=2"], "parallel.sequence: got 2; allowed: 1 with objective=classification"),
        (["objective=mlm"], "objective: got mlm; allowed: seq2seq, classification, regression, tagging"),
        (["optimizer.layer_decay=1.5"], "optimizer.layer_decay: got 1.5; allowed: more than 0, up to 1"),
        (["optimizer.head_lr=0"], "optimizer.head_lr: got 0.0; allowed: a positive number, or null"),
        (["method=gradual"], "method: got gradual with a model that starts from the seed; allowed: full"),
        (["method=half"], "method: got 'half'; allowed: full, features, gradual"),
        (
            ["transfer.l2_sp=0.1"],
            "transfer.l2_sp: got 0.1 with a model that starts from the seed; allowed: 0",
        ),
        (["transfer.l2_new=-1"], "transfer.l2_new: got -1.0; allowed: 0 or more"),
        (["gradual.every=0"], "gradual.every: got 0; allowed: 1 or more, or null"),
    ],
)
def test_a_mistake_is_one_line(
    more: list[str],
    said: str,
    reviews: Path,
    corpus: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    words = settings(reviews, corpus, tmp_path, "model=bert_tiny", *TINY[:1], *more)
    if more == ["model=simple_cnn"]:
        words.remove(TINY[0])
    assert cli.run_verb("finetune", words) == 2
    lines = [line for line in capsys.readouterr().err.splitlines() if line.startswith("llmtrain: error")]
    assert len(lines) == 1
    assert said in lines[0]
    assert not (tmp_path / "run").exists()


@pytest.fixture(scope="module")
def tuned(reviews: Path, corpus: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("tuned")
    words = settings(reviews, corpus, folder, "model=bert_tiny", *TINY, "train.epochs=6")
    assert cli.run_verb("finetune", words) == 0
    return folder / "run"


def test_what_a_run_read_is_shown_and_traced(
    tuned: Path, reviews: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    cache = f"data.cache.dir={tmp_path}"
    capsys.readouterr()
    assert cli.run_verb("data_show", [f"run={tuned}", "step=2", "max_samples=2", cache]) == 0
    shown = capsys.readouterr().out
    assert shown.startswith("step 2, sample 16: epoch 0, row ")
    assert "[CLS]" in shown
    assert shown.count(", label good") + shown.count(", label bad") == 2
    assert cli.run_verb("data_trace", [f"run={tuned}", "step=1:3", cache]) == 0
    assert capsys.readouterr().out.count("as recorded") == 3
    moved = tmp_path / "moved.csv"
    moved.write_text(reviews.read_text().replace("awful", "dreadful"))
    assert cli.run_verb("data_trace", [f"run={tuned}", "step=1", cache, f"data.path={moved}"]) == 2
    assert "other data than those of the step" in capsys.readouterr().err


def test_rows_are_shown_without_a_run(
    reviews: Path, corpus: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    words = ["data=table", "objective=classification", f"data.path={reviews}", f"data.tokenizer={corpus}"]
    assert cli.run_verb("data_show", [*words, f"data.cache.dir={tmp_path}", "max_samples=1"]) == 0
    assert ", label " in capsys.readouterr().out


def test_a_new_head_in_place_of_one_that_is_there(
    tuned: Path, reviews: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Other labels are refused unless a new head is asked for, which starts from the seed."""
    other = tmp_path / "other.csv"
    other.write_text(reviews.read_text().replace(",good,", ",fine,"))
    words = [f"model.path={tuned}", "objective=classification", f"data.path={other}", *SHORT]
    words += [f"data.cache.dir={tmp_path / 'cache'}", f"run.dir={tmp_path / 'run'}", "train.epochs=0.2"]
    assert cli.run_verb("finetune", words) == 2
    assert "objective.new_head=true makes a new head" in capsys.readouterr().err
    assert cli.run_verb("finetune", [*words, "objective.new_head=true"]) == 0
    said = capsys.readouterr().err
    assert "new, started from the seed: head.dense.weight" in said
    assert "unused of" in said
    assert "fine" in (tmp_path / "run/config.yaml").read_text()


@pytest.mark.in_turns(3)
@pytest.mark.parametrize("suffix", [".jsonl", ".csv", ".parquet"])
def test_predictions_stand_beside_the_rows_in_their_order(
    suffix: str, tuned: Path, reviews: Path, tmp_path: Path
) -> None:
    output = tmp_path / f"said{suffix}"
    words = [f"checkpoint={tuned}", f"input={reviews}", f"output={output}"]
    assert cli.run_verb("predict", words) == 0
    rows = list(csv.DictReader(reviews.open()))
    if suffix == ".csv":
        said: list[dict[str, Any]] = list(csv.DictReader(output.open()))
    elif suffix == ".jsonl":
        said = [json.loads(line) for line in output.read_text().splitlines()]
    else:
        import pyarrow.parquet

        said = pyarrow.parquet.read_table(output).to_pylist()
    assert [row["text"] for row in said] == [row["text"] for row in rows]
    assert [row["grade"] for row in said] == [row["grade"] for row in rows]
    right = [row["prediction"] == row["label"] for row in said]
    assert np.mean(right) > 0.9
    assert all(0.5 <= float(row["probability"]) <= 1 for row in said)
    assert [path.name for path in tmp_path.iterdir()] == [output.name]


def test_a_killed_prediction_goes_on(
    tuned: Path, reviews: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from llmtrain.commands import predict

    monkeypatch.setattr(predict, "ROWS_AT_A_TIME", 64)
    words = [f"checkpoint={tuned}", f"input={reviews}"]
    assert cli.run_verb("predict", [*words, f"output={tmp_path / 'whole.jsonl'}"]) == 0
    forward, calls = predict._Work._forward, 0

    def dies(self: Any, *arguments: Any) -> Any:
        nonlocal calls
        calls += 1
        if calls == 5:
            raise KeyboardInterrupt
        return forward(self, *arguments)

    monkeypatch.setattr(predict._Work, "_forward", dies)
    assert cli.run_verb("predict", [*words, f"output={tmp_path / 'said.jsonl'}"]) == 130
    assert not (tmp_path / "said.jsonl").exists()
    before, calls = calls, 1000
    assert cli.run_verb("predict", [*words, f"output={tmp_path / 'said.jsonl'}"]) == 0
    assert (tmp_path / "said.jsonl").read_bytes() == (tmp_path / "whole.jsonl").read_bytes()
    assert before == 5


def test_transformers_pipeline_says_the_same(tuned: Path, reviews: Path, tmp_path: Path) -> None:
    import transformers

    assert cli.run_verb("export", [f"checkpoint={tuned}", f"output={tmp_path / 'exported'}"]) == 0
    output = tmp_path / "said.jsonl"
    words = [f"checkpoint={tuned}", f"input={reviews}", f"output={output}", "sequence_length=256"]
    assert cli.run_verb("predict", words) == 0
    rows = [json.loads(line) for line in output.read_text().splitlines()][:50]
    pipeline = transformers.pipeline("text-classification", str(tmp_path / "exported"))
    for row, theirs in zip(rows, pipeline([row["text"] for row in rows]), strict=True):
        assert theirs["label"] == row["prediction"]
        assert theirs["score"] == pytest.approx(row["probability"], abs=1e-4)
    imported = tmp_path / "again.jsonl"
    words = [f"checkpoint={tmp_path / 'exported'}", f"input={reviews}", f"output={imported}"]
    assert cli.run_verb("predict", words) == 0
    again = [json.loads(line) for line in imported.read_text().splitlines()][:50]
    assert [row["prediction"] for row in again] == [row["prediction"] for row in rows]
