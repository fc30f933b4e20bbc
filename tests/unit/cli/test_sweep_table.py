"""The table at the end of a sweep."""

from __future__ import annotations

import csv
import json
import statistics
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from llmtrain.cli import main as cli
from llmtrain.cli.sweep_table import SweptJob, report


def job(folder: Path, overrides: str, figures: dict[str, float | None], best: Any = None) -> SweptJob:
    place = folder / overrides.replace("/", "_")
    place.mkdir()
    (place / "figures.json").write_text(json.dumps({"step": 9, "figures": figures, "best": best}))
    return SweptJob.of(["data.path=x", *overrides.split()], {"seed", "optimizer.lr"}, place, True)


def test_jobs_that_differ_by_seed_alone_are_averaged(tmp_path: Path) -> None:
    losses = {"0.1": [1.0, 1.5, 2.0], "0.2": [3.0, 3.0, 3.0]}
    jobs = [
        job(tmp_path, f"+optimizer.lr={lr} seed={seed}", {"loss": losses[lr][seed], "accuracy": None})
        for lr in losses
        for seed in range(3)
    ]
    best = {"step": 4, "figures": {"loss": 0.25}}
    jobs.append(job(tmp_path, "optimizer.lr=0.3 seed=0", {"loss": 7.0}, best))
    jobs.append(
        SweptJob.of(["seed=1", "optimizer.lr=0.3"], {"seed", "optimizer.lr"}, tmp_path / "gone", True)
    )
    lines = list(report(jobs, [tmp_path] * len(jobs)))
    assert lines[1].split() == ["optimizer.lr", "seed", "step", "loss"]
    assert lines[2].split() == ["0.1", "0", "9", "1.0000"]
    assert lines[8].split() == ["0.3", "0", "4", "0.2500"], "its best evaluation"
    assert lines[9].split() == ["0.3", "1", "-", "-"]
    assert lines[10] == "optimizer.lr=0.1 mean ± standard deviation of 3 seeds: loss 1.5000 ± 0.5000"
    assert lines[11] == "optimizer.lr=0.2 mean ± standard deviation of 3 seeds: loss 3.0000 ± 0.0000"
    assert lines[12].startswith("written to"), "one seed has no deviation"
    rows = list(csv.DictReader((tmp_path / "sweep.csv").open()))
    assert [row["loss"] for row in rows] == ["1.0", "1.5", "2.0", "3.0", "3.0", "3.0", "0.25", ""]
    said = json.loads((tmp_path / "sweep.json").read_text())
    assert said["over_seeds"][0]["figures"] == {"loss": {"mean": 1.5, "deviation": 0.5}}
    assert len(said["jobs"]) == 8


def test_a_sweep_without_figures_says_nothing(tmp_path: Path) -> None:
    jobs = [SweptJob.of(["seed=1"], {"seed"}, tmp_path / "none", True)]
    assert list(report(jobs, [tmp_path])) == []
    assert not list(tmp_path.iterdir())


def test_seeds_of_a_fine_tuning(corpus: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    draw = np.random.default_rng(0)
    rows = [(" ".join(draw.choice(["film", "old", "fine", "dog"], 6)), n % 2) for n in range(60)]
    path = tmp_path / "rows.csv"
    path.write_text("text,label\n" + "".join(f"{text},{label}\n" for text, label in rows))
    words = ["model=bert_tiny", "model.num_layers=1", "model.hidden_size=16", "model.num_heads=2"]
    words += [f"data.path={path}", f"data.tokenizer={corpus}", f"data.cache.dir={tmp_path / 'cache'}"]
    words += ["objective=classification", "data.split.validation=0.3", "train.epochs=null", "train.steps=2"]
    words += ["batch.global_size=8", "batch.sequence_length=16", f"run.dir={tmp_path / 'runs'}"]
    assert cli.run_verb("finetune", ["--multirun", "seed=0,1", *words, "optimizer.lr=1e-3,-1"]) == 2
    captured = capsys.readouterr()
    assert "job 1: optimizer.lr: got -1.0" in captured.err
    said = json.loads((tmp_path / "runs" / "sweep.json").read_text())
    for swept in said["jobs"]:
        if swept["overrides"]["optimizer.lr"] == "-1":
            assert swept["figures"] == {}
            continue
        metrics = (Path(swept["run_dir"]) / "metrics.jsonl").read_text().splitlines()
        last = json.loads(metrics[-1])
        assert swept["step"] == 2
        assert swept["figures"]["accuracy"] == last["validation_accuracy"]
    [of_seeds] = said["over_seeds"]
    losses = [swept["figures"]["loss"] for swept in said["jobs"] if swept["figures"]]
    assert len(losses) == of_seeds["seeds"] == 2
    assert of_seeds["figures"]["loss"]["mean"] == pytest.approx(statistics.fmean(losses))
    mean = f"loss {statistics.fmean(losses):.4f} ± {statistics.stdev(losses):.4f}"
    assert mean in captured.out
