"""Figures of a fine-tuned model: at each evaluation of its run, at its end, and by `llmtrain evaluate`."""

from __future__ import annotations

import csv
import io
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from llmtrain.cli import main as cli
from llmtrain.scoring.classification import CLASS_FIGURES
from tests.unit.commands.test_finetune import TINY, reviews, settings

__all__ = ["reviews"]  # a fixture
LABELS = ["bad", "good"]


@pytest.fixture(scope="module")
def run(reviews: Path, corpus: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run that ended early."""
    folder = tmp_path_factory.mktemp("figures")
    words = settings(reviews, corpus, folder, "model=bert_tiny", *TINY, "train.epochs=30")
    words += ["evaluation.every=10", "checkpoint.every=1000", "track=[jsonl,tensorboard]"]
    words += ["early_stopping.metric=f1_macro", "early_stopping.patience=2"]
    assert cli.run_verb("finetune", words) == 0
    return folder / "run"


def evaluations(run: Path) -> list[dict[str, Any]]:
    lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    return [line for line in lines if "validation_loss" in line]


def evaluate(capsys: pytest.CaptureFixture[str], *words: str) -> str:
    capsys.readouterr()
    assert cli.run_verb("evaluate", list(words)) == 0
    return capsys.readouterr().out


def is_picture(path: Path) -> bool:
    image = Image.open(io.BytesIO(path.read_bytes()))
    return image.format == "PNG" and len(np.unique(np.asarray(image).reshape(-1, 4), axis=0)) > 20


def test_each_evaluation_has_the_figures_of_the_task(run: Path) -> None:
    for record in evaluations(run):
        assert {f"validation_{name}" for name in CLASS_FIGURES} <= record.keys()
    values = [record["validation_f1_macro"] for record in evaluations(run)]
    best = int(np.argmax(values))
    assert len(values) == best + 3, "two evaluations without a better one"
    assert values[best] > 0.8
    found = json.loads((run / "figures.json").read_text())
    last, first_best = evaluations(run)[-1], evaluations(run)[best]
    assert found["step"] == last["step"]
    assert found["figures"] == {name: last[f"validation_{name}"] for name in found["figures"]}
    assert found["best"]["step"] == first_best["step"]
    assert found["best"]["figures"]["accuracy"] == first_best["validation_accuracy"]


def test_the_figures_of_the_run_are_those_of_evaluate(run: Path, capsys: pytest.CaptureFixture[str]) -> None:
    best = json.loads((run / "figures.json").read_text())["best"]
    found = json.loads(evaluate(capsys, f"checkpoint={run}/best", "format=json"))
    assert found["step"] == best["step"]
    for name in CLASS_FIGURES:
        assert found[name] == pytest.approx(best["figures"][name], abs=1e-6), name
        low, high = found[f"{name}_interval"]
        assert low <= found[name] <= high
    assert "is the newest of" not in capsys.readouterr().err
    capsys.readouterr()
    assert cli.run_verb("evaluate", [f"checkpoint={run}"]) == 0
    assert f"{run}/best is step-{best['step']:08d}, which has the best f1_macro" in capsys.readouterr().err


def test_pictures_at_the_end_of_the_run(run: Path) -> None:
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    events = EventAccumulator(str(run / "tensorboard"), size_guidance={"images": 0})
    events.Reload()
    last = evaluations(run)[-1]["step"]
    for name in ("confusion", "calibration"):
        assert is_picture(run / f"{name}.png")
        [image] = events.Images(name)
        assert image.step == last
        shown = Image.open(io.BytesIO(image.encoded_image_string))
        assert shown.size == Image.open(run / f"{name}.png").size


def test_a_file_and_the_part_of_a_file(
    run: Path, reviews: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    rows = list(csv.DictReader(reviews.open()))
    path = tmp_path / "held.csv"
    with open(path, "w", newline="") as file:
        writer = csv.DictWriter(file, rows[0])
        writer.writeheader()
        writer.writerows(rows[:50])
    whole = [f"checkpoint={run}", f"data.test={path}", "split=test", "format=json"]
    found = json.loads(evaluate(capsys, *whole, f"output={tmp_path / 'found.json'}"))
    assert found["targets"] == 50
    counts = np.array(found["confusion_matrix"]["counts"])
    assert counts.sum(1).tolist() == [25, 25]
    assert counts.trace() / 50 == found["accuracy"]
    assert found["confusion_matrix"]["labels"] == list(found["classes"]) == LABELS
    assert found["classes"]["good"]["recall"] == counts[1, 1] / 25
    assert sum(part["rows"] for part in found["calibration"]) == 50
    assert json.loads((tmp_path / "found.json").read_text()) == found
    assert is_picture(tmp_path / "found.confusion.png")
    assert is_picture(tmp_path / "found.calibration.png")
    said = evaluate(
        capsys, f"checkpoint={run}", f"data.path={reviews}", "split=test", f"pictures={tmp_path / 'drawn'}"
    )
    lines = said.splitlines()
    targets = int(next(line for line in lines if line.startswith("targets ")).split()[1])
    assert 0 < targets < 60, "the part of the file that is the test split"
    _, value, *interval = next(line for line in lines if line.startswith("accuracy ")).split()
    assert interval[0].startswith("[")
    assert 0.8 < float(value) <= 1
    assert lines[-3].split() == LABELS
    assert lines[-2].split()[0] == "bad"
    assert is_picture(tmp_path / "drawn" / "confusion.png")


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["data.label_field=grade"], "data.label_field (grade): got the labels"),
        (["data.test=HELD", "split=test", "data.label_field=grade"], "got the label 7 in the test split"),
        (["data.text_field=words"], "got no field words; allowed: text, label, grade"),
        (["data.tst=HELD", "split=test"], "data.tst: got an unknown key"),
        (["data.test=HELD"], "got no split 'validation'; allowed: test"),
        (["pictures=/no/such/folder"], "pictures=/no/such/folder: got a location that is not writable"),
    ],
)
def test_a_mistake_is_one_line(
    words: list[str], said: str, run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    held = tmp_path / "held.csv"
    held.write_text("text,label,grade\na fine tale,good,7\n")
    given = [word.replace("HELD", str(held)) for word in words]
    capsys.readouterr()
    assert cli.run_verb("evaluate", [f"checkpoint={run}", *given]) == 2
    errors = [line for line in capsys.readouterr().err.splitlines() if line.startswith("llmtrain: error")]
    assert len(errors) == 1
    assert said in errors[0]
