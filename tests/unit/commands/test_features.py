"""`llmtrain finetune method=features`: vectors once, a head like scikit-learn's, and a run like any."""

from __future__ import annotations

import csv
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from sklearn.linear_model import LogisticRegression
from sklearn.preprocessing import StandardScaler

from llmtrain.checkpoint.reader import Checkpoint
from llmtrain.cli import main as cli
from tests.support.warm import on_ranks

ROWS = 1600
"""Two chunks of vectors to train on."""
WORDS = ["the", "film", "was", "a", "fine", "old", "tale", "of", "two", "men", "and", "one", "dog"]
SIZE = ("model.num_layers=1", "model.hidden_size=16", "model.num_heads=2", "model.init_std=0.3")
"""Weights so large that the vectors of texts differ by more than rounding."""
BATCH = ("batch.global_size=16", "batch.micro_size=8", "batch.sequence_length=32")


@pytest.fixture(scope="module")
def reviews(tmp_path_factory: pytest.TempPathFactory) -> Path:
    draw = np.random.default_rng(0)
    path = tmp_path_factory.mktemp("reviews") / "reviews.csv"
    with open(path, "w", newline="") as file:
        writer = csv.writer(file)
        writer.writerow(["text", "label", "grade"])
        for _ in range(ROWS):
            words = list(draw.choice(WORDS, draw.integers(4, 14)))
            good = words.count("fine") + words.count("film") + draw.normal() > 1.5
            writer.writerow([" ".join(words), ("bad", "good")[int(good)], len(words)])
    return path


def trunk(model: str, corpus: Path, folder: Path) -> Path:
    words = [f"model={model}", *SIZE, *BATCH, f"data.path={corpus}", f"run.dir={folder / model}"]
    words += ["train.steps=1", "evaluation.every=null", "evaluation.at_start=false"]
    assert cli.run_verb("train", words) == 0
    return folder / model


@pytest.fixture(scope="module")
def bert(corpus: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return trunk("bert_tiny", corpus, tmp_path_factory.mktemp("trunk"))


def settings(model: Path, reviews: Path, folder: Path, run: str, *more: str) -> list[str]:
    data = [f"data.path={reviews}", f"data.cache.dir={folder / 'cache'}", "data.split.validation=0.2"]
    words = [f"model.path={model}", "method=features", f"run.dir={folder / run}", *data, *BATCH, *more]
    return words if any(word.startswith("objective=") for word in more) else [*words, TASK]


TASK = "objective=classification"


def cached(folder: Path) -> list[Path]:
    return sorted((folder / "cache").glob("vectors-*/*.npy"))


def figures(capsys: pytest.CaptureFixture[str], run: Path) -> dict[str, Any]:
    capsys.readouterr()
    assert cli.run_verb("evaluate", [f"checkpoint={run}", "format=json"]) == 0
    found: dict[str, Any] = json.loads(capsys.readouterr().out)
    return found


def train_vectors(folder: Path) -> np.ndarray:
    """The vectors of the split that has two chunks."""
    chunks = max((sorted(path.glob("*.npy")) for path in (folder / "cache").glob("vectors-*")), key=len)
    return np.concatenate([np.load(path) for path in chunks])


def labels_of(folder: Path) -> np.ndarray:
    [path] = (folder / "cache").glob("*/train/label.npy")
    return np.asarray(np.load(path))


@pytest.mark.parametrize("model", ["bert_tiny", "gpt_tiny"])
def test_predictions_equal_scikit_learn(
    model: str, reviews: Path, bert: Path, corpus: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    start = bert if model == "bert_tiny" else trunk(model, corpus, tmp_path)
    assert (
        cli.run_verb("finetune", settings(start, reviews, tmp_path, "run", "features.strengths=[1e-3]")) == 0
    )
    weights = Checkpoint.open(tmp_path / "run/checkpoints/step-00000001").weights()
    rows = train_vectors(tmp_path).astype(np.float64)
    labels = labels_of(tmp_path)
    has_bias = "head.out.bias" in weights
    assert has_bias == (model == "bert_tiny")
    if has_bias:
        rows = np.tanh(rows @ weights["head.dense.weight"].numpy().T + weights["head.dense.bias"].numpy())
    # GPT-2's head has no biases: its vectors are scaled, but not centered.
    scaled = StandardScaler().fit_transform(rows) if has_bias else rows / np.sqrt((rows**2).mean(0))
    theirs = LogisticRegression(C=1e3 / len(rows), tol=1e-8, max_iter=5000, fit_intercept=has_bias)
    expected = theirs.fit(scaled, labels).predict_proba(scaled)
    ours = rows @ weights["head.out.weight"].numpy().T
    if has_bias:
        ours += weights["head.out.bias"].numpy()
    probabilities = np.exp(ours) / np.exp(ours).sum(1, keepdims=True)
    np.testing.assert_allclose(probabilities, expected, atol=2e-3)
    output = tmp_path / "said.jsonl"
    assert (
        cli.run_verb("predict", [f"checkpoint={tmp_path / 'run'}", f"input={reviews}", f"output={output}"])
        == 0
    )
    said = [json.loads(line) for line in output.read_text().splitlines()]
    best = sorted(row["probability"] for row in said)
    assert len(best) == ROWS
    assert np.mean([row["prediction"] == row["label"] for row in said]) > np.bincount(labels).max() / len(
        labels
    )


def test_a_run_like_any(
    reviews: Path, bert: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert cli.run_verb("finetune", settings(bert, reviews, tmp_path, "run")) == 0
    said = capsys.readouterr().err
    assert "of which 306 train" in said
    assert "0 from the cache" in said
    assert said.count("  best") == 1
    files = cached(tmp_path)
    assert len(files) == 3
    checkpoint = Checkpoint.open(tmp_path / "run/checkpoints/step-00000001")
    assert checkpoint.frozen == {name for name in checkpoint.weights() if not name.startswith("head.")}
    tried = json.loads((tmp_path / "run/features.json").read_text())
    best = min(tried["tried"], key=lambda row: row["validation_loss"])
    assert tried["strength"] == best["strength"]
    found = figures(capsys, tmp_path / "run")
    assert found["loss"] == pytest.approx(best["validation_loss"], abs=1e-5)
    assert found["loss"] == pytest.approx(checkpoint.manifest["validation_loss"], abs=1e-5)
    assert cli.run_verb("finetune", settings(bert, reviews, tmp_path, "run")) == 0
    assert "already at step 1 of 1" in capsys.readouterr().err

    # Another run takes the vectors of the cache, and makes a damaged chunk anew.
    content = bytearray(files[0].read_bytes())
    content[-1] ^= 1
    files[0].write_bytes(bytes(content))
    assert cli.run_verb("finetune", settings(bert, reviews, tmp_path, "other")) == 0
    lines = [line for line in capsys.readouterr().err.splitlines() if line.startswith("vectors of")]
    assert sum(" 0 computed" in line for line in lines) == 1, lines
    assert cached(tmp_path) == files
    other = Checkpoint.open(tmp_path / "other/checkpoints/step-00000001")
    assert other.manifest["files"] == checkpoint.manifest["files"]  # by checksum

    # Other weights have other vectors.
    assert cli.run_verb("finetune", settings(tmp_path / "run", reviews, tmp_path, "third", "seed=1")) == 0
    assert "0 computed" in capsys.readouterr().err, "the trunk is the same"
    assert cli.run_verb("finetune", settings(bert, reviews, tmp_path, "mean", "objective.pooling=mean")) == 0
    assert " 0 from the cache" in capsys.readouterr().err


def test_transformers_gives_the_same_scores(reviews: Path, bert: Path, tmp_path: Path) -> None:
    import transformers

    assert cli.run_verb("finetune", settings(bert, reviews, tmp_path, "run")) == 0
    run, folder = tmp_path / "run", tmp_path / "exported"
    assert cli.run_verb("export", [f"checkpoint={run}", f"output={folder}"]) == 0
    output = tmp_path / "said.jsonl"
    words = [f"checkpoint={run}", f"input={reviews}", f"output={output}", "sequence_length=256"]
    assert cli.run_verb("predict", words) == 0
    rows = [json.loads(line) for line in output.read_text().splitlines()][:50]
    pipeline = transformers.pipeline("text-classification", str(folder))
    for row, theirs in zip(rows, pipeline([row["text"] for row in rows]), strict=True):
        assert theirs["label"] == row["prediction"]
        assert theirs["score"] == pytest.approx(row["probability"], abs=1e-4)


def test_numbers(reviews: Path, bert: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    task = ("objective=regression", "data.label_field=grade", "objective.pooling=mean")
    assert cli.run_verb("finetune", settings(bert, reviews, tmp_path, "run", *task)) == 0
    assert figures(capsys, tmp_path / "run")["pearson"] > 0.3


@pytest.mark.slow
def test_ranks_share_the_vectors(reviews: Path, bert: Path, tmp_path: Path) -> None:
    found = []
    for size in (1, 2):
        words = settings(bert, reviews, tmp_path / str(size), "run")
        done = on_ranks(size, "finetune", *words)
        assert [process.returncode for process in done] == [0] * size, done[0].stderr
        found.append(Checkpoint.open(tmp_path / str(size) / "run/checkpoints/step-00000001").weights())
    assert [path.name for path in cached(tmp_path / "1")] == [path.name for path in cached(tmp_path / "2")]
    for name, weight in found[0].items():
        np.testing.assert_array_equal(weight, found[1][name])


@pytest.mark.parametrize(
    ("more", "said"),
    [
        (["model=bert_tiny"], "method: got features with a model that starts from the seed; allowed: full"),
        (
            ["objective=tagging"],
            "objective: got tagging with method=features, which has one vector for each text",
        ),
        (["parallel.zero=1"], "parallel.zero: got 1 with method=features, whose ranks hold whole models"),
        (["features.strengths=[]"], "features.strengths: got []; allowed: one strength or more"),
        (["features.strengths=[0.0]"], "features.strengths[0]: got 0.0; allowed: more than 0, at most 1e6"),
        (["data.split.validation=0"], "data.validation: got no rows, by which to choose among 11 strengths"),
    ],
)
def test_a_mistake_is_one_line(
    more: Sequence[str],
    said: str,
    reviews: Path,
    bert: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    words = settings(bert, reviews, tmp_path, "run", *more)
    if more[0].startswith("model="):
        words = [word for word in words if not word.startswith("model.path=")] + [f"data.tokenizer={bert}"]
    if more == ["objective=tagging"]:
        path = tmp_path / "tags.conll"
        path.write_text("film\tB-WORK\n\n" * 40 + "dog\tO\n\n" * 40)
        words = [f"data.path={path}" if word.startswith("data.path=") else word for word in words]
        words += ["data.text_field=tokens", "data.label_field=tags"]
    assert cli.run_verb("finetune", words) == 2
    lines = [line for line in capsys.readouterr().err.splitlines() if line.startswith("llmtrain: error")]
    assert len(lines) == 1
    assert said in lines[0]
    assert not list((tmp_path / "run").glob("checkpoints/*"))
