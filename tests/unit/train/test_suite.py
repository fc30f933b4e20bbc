"""Tasks of the lm-evaluation-harness at evaluations: their figures, and a run that is the same without."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from llmtrain.cli import main as cli
from llmtrain.errors import ConfigError
from llmtrain.train.resolve import resolve
from tests.support import warm
from tests.support.harness_tasks import write_tasks
from tests.support.training import TINY_GPT, compose

RUN = (
    *TINY_GPT,
    "train.steps=4",
    "evaluation.every=1",
    "evaluation.at_start=false",
    "evaluation.max_samples=4",
    "model.dropout=0.1",
    "exact_dropout=false",
    "schedule=constant",
)


@pytest.fixture(scope="module", autouse=True)
def offline() -> Iterator[None]:
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("HF_HUB_OFFLINE", "1")
        yield


@pytest.fixture(scope="module")
def tasks(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_tasks(tmp_path_factory.mktemp("tasks"), documents=6)


def of_tasks(tasks: Path) -> list[str]:
    return [
        "harness.tasks=[choice,texts,writing]",
        f"harness.tasks_path={tasks}",
        "harness.every=2",
        "harness.limit=4",
        "model.max_sequence_length=64",
    ]


def records(run: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]


def curve(run: Path) -> list[tuple[Any, ...]]:
    found = [(r["step"], r["loss"], r["data_digest"]) for r in records(run) if "loss" in r]
    return found + [(r["step"], r["validation_loss"]) for r in records(run) if "validation_loss" in r]


@pytest.mark.slow
def test_figures_are_tracked_and_the_run_is_the_same(
    corpus: Path, tasks: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
):
    plain, measured = tmp_path / "plain", tmp_path / "measured"
    words = [*RUN, f"data.path={corpus}", *of_tasks(tasks)]
    assert cli.run_verb("train", [*words, f"run.dir={plain}", "harness.tasks=[]"]) == 0
    capsys.readouterr()
    assert cli.run_verb("train", [*words, f"run.dir={measured}", "train.steps=2"]) == 0
    assert "step 2: tasks: choice/acc " in capsys.readouterr().err
    assert cli.run_verb("train", [*words, f"run.dir={measured}"]) == 0  # resumes
    assert curve(plain) == curve(measured)
    found = {r["step"]: r for r in records(measured) if "harness/choice/acc" in r}
    assert sorted(found) == [2, 4]
    assert found[4]["harness/texts/word_perplexity"] > 1
    assert 0 <= found[4]["harness/writing/exact_match"] <= 1
    # The last figures are those of the last checkpoint.
    words = [f"checkpoint={measured}", "suite=lm_eval", "tasks=[choice,texts]", f"tasks_path={tasks}"]
    assert cli.run_verb("evaluate", [*words, "limit=4", "format=json"]) == 0
    results = json.loads(capsys.readouterr().out)["results"]
    assert results["choice"]["acc,none"] == found[4]["harness/choice/acc"]
    assert results["texts"]["bits_per_byte,none"] == pytest.approx(found[4]["harness/texts/bits_per_byte"])


@pytest.mark.slow
def test_two_ranks_find_the_same(corpus: Path, tasks: Path, tmp_path: Path):
    words = [*RUN, f"data.path={corpus}", *of_tasks(tasks), "train.steps=2", "exact_dropout=true"]
    found = {}
    for name, size, layout in (
        ("one", 1, []),
        ("zero", 2, ["parallel.zero=2"]),
        ("tensor", 2, ["parallel.tensor=2"]),
    ):
        done = warm.on_ranks(size, "train", *words, *layout, f"run.dir={tmp_path / name}", HF_HUB_OFFLINE="1")
        assert all(each.returncode == 0 for each in done), done[0].stderr
        (found[name],) = [r for r in records(tmp_path / name) if "harness/choice/acc" in r]
    for name in ("zero", "tensor"):
        assert found[name].keys() == found["one"].keys()
        for key, value in found["one"].items():
            if key.startswith("harness/"):
                assert found[name][key] == pytest.approx(value, rel=1e-4), key


@pytest.mark.parametrize(
    ("changes", "size", "message"),
    [
        (["evaluation.every=null"], 1, "harness.tasks: got tasks with evaluation.every=null"),
        (
            ["evaluation.every=3"],
            1,
            "harness.every: got 2; allowed: a multiple of evaluation.every=3, such as 3",
        ),
        (["harness.tasks=[choise]"], 1, "harness.tasks: got 'choise', which is no task"),
        (["parallel.zero=3"], 2, "harness.tasks: got tasks with parallel.zero=3; .*evaluate its checkpoints"),
        (["parallel.pipeline=2", "parallel.zero=1"], 2, "harness.tasks: got tasks with parallel.pipeline=2"),
        (["parallel.sequence=2"], 2, "harness.tasks: got tasks with parallel.sequence=2"),
        (["harness.limit=0"], 1, "harness.limit: got 0"),
    ],
)
def test_refusals(changes: list[str], size: int, message: str, corpus: Path, tasks: Path):
    with pytest.raises(ConfigError, match=message) as caught:
        resolve(
            compose([*RUN, f"data.path={corpus}", *of_tasks(tasks), "exact_dropout=true", *changes]), size
        )
    assert len(caught.value.problems) == 1


def test_a_model_that_continues_no_texts_is_refused(corpus: Path, tasks: Path):
    words = [word for word in RUN if not word.startswith("model=")]
    with pytest.raises(ConfigError, match=r"harness\.tasks: got tasks with model\.family=bert"):
        resolve(compose([*words, f"data.path={corpus}", "model=bert_tiny", *of_tasks(tasks)]), 1)
