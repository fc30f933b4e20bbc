"""`llmtrain status` and `llmtrain report` of real runs: stopped, resumed, held by another process, failed."""

from __future__ import annotations

import json
import os
import shutil
import time
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import pytest

from llmtrain.cli import main as cli
from llmtrain.report.page import MOST_POINTS, _thinned, page_of
from llmtrain.report.record import Series, read_run
from llmtrain.track.events import note_event, read_events
from llmtrain.track.jsonl import read_metrics
from llmtrain.train.run_folder import RunFolder

TINY = ("model=gpt_tiny", "model.num_layers=1", "model.hidden_size=32", "model.num_heads=2")
SHORT = ("batch.global_size=4", "batch.micro_size=4", "batch.sequence_length=16", "evaluation.max_samples=4")


def trained(corpus: Path, folder: Path, *more: str) -> int:
    words = [*TINY, *SHORT, f"data.path={corpus}", f"run.dir={folder}", "evaluation.every=2", *more]
    return cli.run_verb("train", words)


@pytest.fixture(scope="module")
def runs(corpus: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """A run that took two starts, and another with another learning rate."""
    root = tmp_path_factory.mktemp("runs")
    for steps in (2, 4):
        assert trained(corpus, root / "first", "run.name=<first>", f"train.steps={steps}") == 0
    assert trained(corpus, root / "second", "run.name=second", "train.steps=2", "optimizer.lr=0.01") == 0
    return root / "first", root / "second"


def status(capsys: pytest.CaptureFixture[str], run: Path) -> dict[str, Any]:
    capsys.readouterr()
    assert cli.run_verb("status", [str(run), "format=json"]) == 0
    found: dict[str, Any] = json.loads(capsys.readouterr().out)
    return found


def test_where_a_finished_run_is(runs: tuple[Path, Path], capsys: pytest.CaptureFixture[str]) -> None:
    found = status(capsys, runs[0])
    assert found["state"] == "finished"
    assert (found["step"], found["steps"], found["checkpoint_step"], found["starts"]) == (4, 4, 4, 2)
    assert found["process"] is None
    assert found["seconds_left"] is None
    last = json.loads((runs[0] / "metrics.jsonl").read_text().splitlines()[-1])
    assert found["validation_loss"] == last["validation_loss"]
    assert cli.run_verb("status", [f"run={runs[0]}"]) == 0
    shown = capsys.readouterr().out
    assert "state           finished\n" in shown
    assert "step            4 of 4 (100.0%)\n" in shown
    kinds = [(event.kind, event.step) for event in read_events(runs[0] / "events.jsonl")]
    assert kinds == [("start", 0), ("save", 2), ("done", 2), ("start", 2), ("save", 4), ("done", 4)]


def test_the_end_of_long_metrics_is_read(tmp_path: Path) -> None:
    path = tmp_path / "metrics.jsonl"
    path.write_text("".join(json.dumps({"step": step, "loss": step / 7}) + "\n" for step in range(1, 500)))
    records = list(read_metrics(path))
    assert [record["step"] for record in records] == list(range(1, 500))
    for last_bytes in (1000, 1001, 1017):
        found = list(read_metrics(path, last_bytes))
        assert found == records[-len(found) :]
        assert 900 < sum(len(json.dumps(record)) + 1 for record in found) <= last_bytes
    assert list(read_metrics(path, 1 << 20)) == records


def test_a_run_that_a_process_holds(
    runs: tuple[Path, Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run = tmp_path / "run"
    run.mkdir()
    for name in ("config.yaml", "metrics.jsonl", "environment.json"):
        (run / name).write_bytes((runs[0] / name).read_bytes())
    config = (run / "config.yaml").read_text().replace("steps: 4", "steps: 10")
    (run / "config.yaml").write_text(config)
    assert status(capsys, run)["state"] == "stopped"
    folder = RunFolder(run)
    assert status(capsys, run)["state"] == "starting"
    folder.note("start", 0)
    now = time.time()
    lines = json.dumps({"event": "start", "at": now - 41, "step": 0}) + "\n"
    (run / "events.jsonl").write_text(lines + "{damaged\n")
    os.utime(run / "metrics.jsonl", (now - 1, now - 1))
    found = status(capsys, run)
    assert found["state"] == "running"
    assert found["process"].startswith(f"process {os.getpid()} on ")
    assert found["seconds_per_step"] == pytest.approx(10, abs=0.2)
    assert found["seconds_left"] == pytest.approx(60, abs=1.5)
    os.utime(run / "metrics.jsonl", (now - 3600, now - 3600))
    assert status(capsys, run)["state"] == "silent"
    folder.note("fail")
    folder.close()
    assert status(capsys, run)["state"] == "failed"


def test_a_run_of_another_host_whose_locks_do_not_reach_here(
    runs: tuple[Path, Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run = tmp_path / "run"
    shutil.copytree(runs[0], run)
    note_event(run, "start", 4)
    (run / ".lock").write_text("process 123 on elsewhere")
    found = status(capsys, run)
    assert (found["state"], found["process"]) == ("running", "process 123 on elsewhere")
    long_ago = time.time() - 60
    os.utime(run / ".lock", (long_ago, long_ago))
    assert status(capsys, run)["process"] is None


def test_a_run_that_fails_says_so(corpus: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert trained(corpus, tmp_path / "run", "train.steps=9", "optimizer.lr=1e30") == 2
    assert status(capsys, tmp_path / "run")["state"] == "failed"


class Page(HTMLParser):
    """Counts the elements of a page, and collects what it would load and its text."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.counts: dict[str, int] = {}
        self.loads: list[str] = []
        self.text = ""
        self.feed(text)

    def handle_starttag(self, tag: str, attributes: list[tuple[str, str | None]]) -> None:
        self.counts[tag] = self.counts.get(tag, 0) + 1
        self.loads += [value or "" for name, value in attributes if name in ("src", "href", "xlink:href")]

    def handle_data(self, data: str) -> None:
        self.text += data


def test_a_page_about_two_runs(
    runs: tuple[Path, Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    output = tmp_path / "page.html"
    words = [*map(str, runs), f"output={output}"]
    assert cli.run_verb("report", words) == 0
    text = output.read_text()
    page = Page(text)
    assert page.counts["svg"] >= 6
    assert "script" not in page.counts
    assert "first" not in page.counts, "names are text"
    assert all(link.startswith("#") for link in page.loads), "it needs no other file"
    assert "<first>" in page.text
    assert "optimizer.lr" in page.text
    loss = read_run(runs[0]).last("validation_loss")
    assert f"{loss:.4f}" in page.text
    assert cli.run_verb("report", words) == 2
    assert "which is there already" in capsys.readouterr().err
    assert cli.run_verb("report", [*words, "overwrite=true"]) == 0


def test_curves_of_many_steps_are_averaged() -> None:
    steps, values = _thinned(Series(list(range(100_000)), [float(n % 2) for n in range(100_000)]))
    assert len(steps) == MOST_POINTS
    assert steps.mean() == pytest.approx(49_999.5, rel=1e-3)
    assert values.mean() == pytest.approx(0.5, abs=1e-3)


@pytest.mark.parametrize(
    ("verb", "words", "said"),
    [
        ("status", ["{empty}"], "run: got {empty}, a folder in which no run started; allowed: a run folder"),
        ("status", ["{empty}/none"], "no such folder"),
        ("status", ["{empty}", "{empty}"], "llmtrain status: got '{empty}'; allowed: a run folder, one"),
        ("report", ["{empty}", "output={empty}/a.html"], "a folder in which no run started"),
        ("report", ["{empty}", "output={empty}/a.txt"], "allowed: a name with .html"),
    ],
)
def test_a_mistake_is_one_line(
    verb: str, words: list[str], said: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert cli.run_verb(verb, [word.format(empty=tmp_path) for word in words]) == 2
    [line] = capsys.readouterr().err.splitlines()
    assert said.format(empty=tmp_path) in line
    assert not any(tmp_path.iterdir())


def test_restarts_are_told(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "config.yaml").write_text("run: {name: a}\ntrain: {steps: 9}\n")
    note_event(tmp_path, "start", 0)
    note_event(tmp_path, "fail")
    note_event(tmp_path, "restart", 4, number=1, why="rank 1 exited with 137")
    found = status(capsys, tmp_path)
    assert (found["restarts"], found["state"]) == (1, "failed"), "a restart that none followed"
    assert cli.run_verb("status", [str(tmp_path)]) == 0
    assert "restarts        1; the last: rank 1 exited with 137\n" in capsys.readouterr().out
    page = page_of([read_run(tmp_path)])
    assert "<td>restart</td><td class=number>4</td><td>number 1, why rank 1 exited with 137</td>" in page
