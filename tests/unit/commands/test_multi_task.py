"""Several tasks at once on the command line: trained, evaluated, predicted, exported and traced."""

from __future__ import annotations

import csv
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from llmtrain.cli import main as cli

WORDS = ["the", "film", "was", "a", "fine", "old", "tale", "of", "two", "men", "and", "one", "dog"]
TINY = (
    "model=bert_tiny",
    "model.num_layers=2",
    "model.hidden_size=32",
    "model.num_heads=4",
    "model.dropout=0",
)
SHORT = ("batch.global_size=16", "batch.micro_size=8", "batch.sequence_length=32", "optimizer.lr=3e-3")
TASKS = (
    "objective=multi_task",
    "objective.tasks.sentiment.kind=classification",
    "objective.tasks.tags.kind=tagging",
    "data=tasks",
    "data.tasks.tags.text_field=words",
    "data.tasks.tags.label_field=tags",
    "data.tasks.sentiment.split.validation=0.2",
    "data.tasks.tags.split.validation=0.2",
)


@pytest.fixture(scope="module")
def files(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Texts with the word that decides their label, and others whose tags follow from their words."""
    draw = np.random.default_rng(0)
    folder = tmp_path_factory.mktemp("files")
    found = {"sentiment": folder / "reviews.csv", "tags": folder / "tags.jsonl"}
    with found["sentiment"].open("w", newline="") as file:
        writer = csv.writer(file)
        writer.writerow(["text", "label"])
        for number in range(300):
            words = [*draw.choice(WORDS, draw.integers(4, 10)), ("awful", "great")[number % 2]]
            draw.shuffle(words)
            writer.writerow([" ".join(words), ("bad", "good")[number % 2]])
    with found["tags"].open("w") as file:
        for _ in range(200):
            words = [str(word) for word in draw.choice(WORDS, draw.integers(3, 8))]
            tags = ["B-WORK" if word == "film" else "O" for word in words]
            file.write(json.dumps({"words": words, "tags": tags}) + "\n")
    return found


def settings(files: dict[str, Path], corpus: Path, folder: Path, *more: str) -> list[str]:
    paths = [f"data.tasks.{name}.path={path}" for name, path in files.items()]
    places = [f"data.tokenizer={corpus}", f"data.cache.dir={folder / 'cache'}", f"run.dir={folder / 'run'}"]
    return [*TINY, *SHORT, *TASKS, *paths, *places, *more]


@pytest.fixture(scope="module")
def trained(files: dict[str, Path], corpus: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("multi")
    words = settings(files, corpus, folder, "train.epochs=6", "data.temperature=2", "evaluation.every=50")
    words += ["checkpoint.best=sentiment/accuracy", "objective.balance=uncertainty"]
    assert cli.run_verb("finetune", words) == 0
    return folder / "run"


def test_both_are_learned(
    trained: Path, files: dict[str, Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    capsys.readouterr()
    assert cli.run_verb("evaluate", [f"checkpoint={trained}", "format=json"]) == 0
    found: dict[str, Any] = json.loads(capsys.readouterr().out)
    assert found["sentiment/accuracy"] > 0.9
    assert found["tags/entity_f1"] > 0.9
    low, high = found["sentiment/accuracy_interval"]
    assert low <= found["sentiment/accuracy"] <= high
    # Classes and tags have a c of 1: L / σ² + log σ.
    weights = {name: found[f"{name}/weight"] for name in ("sentiment", "tags")}
    assert all(weight != 1.0 for weight in weights.values())
    loss = sum(found[f"{name}/loss"] * weight - np.log(weight) / 2 for name, weight in weights.items())
    assert found["loss"] == pytest.approx(loss, rel=1e-5)
    lines = [json.loads(line) for line in (trained / "metrics.jsonl").read_text().splitlines()]
    assert {"sentiment/loss", "tags/loss", "epoch_sentiment", "epoch_tags"} <= set(lines[-2])
    assert "validation_sentiment/accuracy" in lines[-1]
    other = tmp_path / "one.csv"
    other.write_text("text,label\nthe great film,bad\nan awful dog,good\n")
    words = [f"checkpoint={trained}", "format=json", f"data.tasks.sentiment.test={other}", "split=test"]
    assert cli.run_verb("evaluate", words) == 0
    assert json.loads(capsys.readouterr().out)["sentiment/accuracy"] == 0.0


def test_the_shares_are_those_of_the_temperature(trained: Path) -> None:
    said = json.loads((trained / "data.json").read_text())
    rows = said["timeline"][0]["settings"]["samples"]
    roots = {name: count**0.5 for name, count in rows.items()}
    shares = {name: root / sum(roots.values()) for name, root in roots.items()}
    assert said["timeline"][0]["shares"] == pytest.approx(shares)


def test_what_was_read_is_shown_and_traced(
    trained: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    cache = f"data.cache.dir={tmp_path}"
    capsys.readouterr()
    assert cli.run_verb("data_trace", [f"run={trained}", "step=1:2", cache]) == 0
    assert capsys.readouterr().out.count("as recorded") == 2
    assert cli.run_verb("data_show", [f"run={trained}", "step=1", "max_samples=8", cache]) == 0
    shown = capsys.readouterr().out
    assert "task sentiment, " in shown
    assert "task tags, " in shown


def test_one_task_is_predicted_and_exported(trained: Path, files: dict[str, Path], tmp_path: Path) -> None:
    import transformers

    output = tmp_path / "said.jsonl"
    words = [f"checkpoint={trained}", f"input={files['sentiment']}", f"output={output}", "task=sentiment"]
    assert cli.run_verb("predict", words) == 0
    said = [json.loads(line) for line in output.read_text().splitlines()]
    assert np.mean([row["prediction"] == row["label"] for row in said]) > 0.9
    tagged = tmp_path / "tagged.jsonl"
    words = [f"checkpoint={trained}", f"input={files['tags']}", f"output={tagged}", "task=tags"]
    assert cli.run_verb("predict", words) == 0
    rows = [json.loads(line) for line in tagged.read_text().splitlines()]
    assert np.mean([row["prediction"] == row["tags"] for row in rows]) > 0.9
    exported = tmp_path / "exported"
    assert cli.run_verb("export", [f"checkpoint={trained}", f"output={exported}", "task=sentiment"]) == 0
    pipeline = transformers.pipeline("text-classification", str(exported))
    for row, theirs in zip(said[:30], pipeline([row["text"] for row in said[:30]]), strict=True):
        assert theirs["label"] == row["prediction"]
        assert theirs["score"] == pytest.approx(row["probability"], abs=1e-4)


def test_no_pipeline_evaluates_it(trained: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.run_verb("evaluate", [f"checkpoint={trained}", "parallel.pipeline=2"]) == 2
    assert "parallel.pipeline: got 2; allowed: 1 with objective=multi_task" in capsys.readouterr().err


@pytest.mark.parametrize("verb", ["predict", "export"])
@pytest.mark.parametrize(("task", "said"), [([], "task: got nothing"), (["task=topic"], "task: got topic")])
def test_which_task(
    verb: str,
    task: list[str],
    said: str,
    trained: Path,
    files: dict[str, Path],
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    own = [f"input={files['tags']}", f"output={tmp_path / 'x.jsonl'}"] if verb == "predict" else []
    words = [f"checkpoint={trained}", *(own or [f"output={tmp_path / 'x'}"]), *task]
    assert cli.run_verb(verb, words) == 2
    assert f"{said}; allowed: sentiment, tags" in capsys.readouterr().err


def test_masked_words_of_unlabelled_text_beside_a_task(
    files: dict[str, Path], corpus: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """The pre-trained head goes on: L_task + λ (L_MLM + γ L_NSP)."""
    places = [f"data.path={corpus}", f"run.dir={tmp_path / 'trunk'}", "objective=mlm_nsp", "train.steps=2"]
    never = ["evaluation.every=null", "evaluation.at_start=false"]
    assert cli.run_verb("train", [*TINY, *SHORT, *places, *never]) == 0
    words = ["objective=multi_task", "objective.tasks.sentiment.kind=classification", "data=tasks"]
    words += ["objective.tasks.text.kind=mlm", "objective.tasks.text.pairs=next_sentence"]
    words += ["objective.tasks.text.pair_weight=0.5", "objective.weights.text=0.1", "data.shares.text=0.5"]
    words += [f"data.tasks.sentiment.path={files['sentiment']}", f"data.corpora.text.path={corpus}"]
    words += [f"data.cache.dir={tmp_path / 'cache'}", f"run.dir={tmp_path / 'run'}", "train.epochs=null"]
    words += ["train.steps=3", f"model.path={tmp_path / 'trunk'}", *SHORT, "evaluation.max_samples=40"]
    capsys.readouterr()
    assert cli.run_verb("finetune", words) == 0
    said = capsys.readouterr().err
    new = next(line for line in said.splitlines() if "new, started from the seed" in line)
    assert "head.tasks.sentiment.out.weight" in new
    assert "4 parameters" not in new, "the pooler became the head's dense layer, the others went on"
    assert "unused of" not in said
    assert cli.run_verb("evaluate", [f"checkpoint={tmp_path / 'run'}", "format=json", "max_samples=40"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert {"sentiment/accuracy", "text/loss", "text/masked_accuracy", "text/pair_accuracy"} <= set(found)
    assert found["loss"] == pytest.approx(found["sentiment/loss"] + 0.1 * found["text/loss"], rel=1e-5)
    output = tmp_path / "said.jsonl"
    words = [f"checkpoint={tmp_path / 'run'}", f"input={files['sentiment']}", f"output={output}"]
    assert cli.run_verb("predict", [*words, "task=sentiment"]) == 0
    assert cli.run_verb("predict", [*words, "task=text"]) == 2
    assert "task: got text; allowed: sentiment" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("more", "said"),
    [
        (
            ["objective.tasks.topic.kind=classification"],
            "data.tasks: got tags, sentiment; allowed: ",
        ),
        (["objective.tasks.Tags.kind=tagging"], "objective.tasks: got the name Tags beside tags"),
        (["objective.tasks.values.kind=tagging"], "objective.tasks: got 'values'; allowed: letters"),
        (["objective.tasks.tags.kind=tagger"], "objective.tasks.tags.kind: got 'tagger'; allowed: "),
        (["objective.weights.topic=2"], "objective.weights.topic: got no task; allowed: sentiment, tags"),
        (["objective.weights.tags=0"], "objective.weights.tags: got 0.0; allowed: a positive number"),
        (["data.temperature=0"], "data.temperature: got 0.0; allowed: a positive number"),
        (["data.shares={sentiment: 0.7, tags: 0.7}"], "data.shares: got {'sentiment': 0.7, 'tags': 0.7}"),
        (["data.shares.topic=0.5"], "data.shares.topic: got no task"),
        (["data.tasks.tags.tokenizer=x"], "data.tasks.tags.tokenizer: got x; allowed: null"),
        (["data.tasks.tags.text_field=txt"], "got no field txt; allowed: words, tags"),
        (["data.tasks.tags.path=none.csv"], "data.tasks.tags.path (none.csv): got no such file"),
        (["parallel.pipeline=2"], "parallel.pipeline: got 2; allowed: 1 with objective=multi_task"),
        (["data=table", "~data.tasks"], "data.kind: got 'table' with objective.kind=multi_task"),
        (["objective.tasks.text.kind=mlm"], "data.corpora: got none; allowed: text"),
        (["checkpoint.best=loss/tags"], "checkpoint.best: got loss/tags; allowed: loss, sentiment/accuracy"),
        (["checkpoint.best=accuracy"], "checkpoint.best: got accuracy; allowed: loss, sentiment/accuracy"),
        (["task=x"], "task"),
    ],
)
def test_a_mistake_is_one_line(
    more: list[str],
    said: str,
    files: dict[str, Path],
    corpus: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    words = settings(files, corpus, tmp_path, *more)
    if "data=table" in more:
        words = [word for word in words if not word.startswith(("data", "~"))]
        words += ["data=table", f"data.path={files['sentiment']}", f"data.tokenizer={corpus}"]
    assert cli.run_verb("finetune", words) == 2
    lines = [line for line in capsys.readouterr().err.splitlines() if line.startswith("llmtrain: error")]
    assert len(lines) == 1
    assert said in lines[0]
    assert not (tmp_path / "run").exists()
