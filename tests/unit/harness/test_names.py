"""Names of tasks are known from their files, and errors in them are told before the harness is imported."""

from __future__ import annotations

from pathlib import Path

import pytest

from llmtrain.harness import names
from llmtrain.harness.names import files_of, task_problems
from tests.support.harness_tasks import TASKS, write_tasks


@pytest.fixture(scope="module")
def tasks(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = write_tasks(tmp_path_factory.mktemp("tasks"))
    (folder / "below").mkdir()
    (folder / "below/group.yaml").write_text("group: mine  # all\ntask:\n  - choice\n  - letters\n")
    (folder / "below/tagged.yaml").write_text(
        '"task": "tagged"\ntag:\n  - one\n  - "two"\ninclude: ../choice\n'
    )
    (folder / "below/more.yaml").write_text("task: more\ntag: [three, 'four']\n")
    return folder


def test_names_groups_and_tags(tasks: Path):
    assert files_of(tasks).keys() == {*TASKS, "mine", "tagged", "more", "one", "two", "three", "four"}


def said(*tasks: str, path: Path | None) -> list[str]:
    return [str(problem) for problem in task_problems(tasks, path)]


def test_known_names_and_patterns_have_no_problem(tasks: Path):
    assert said("choice", "mine", "let*", "two", path=tasks) == []


def test_tasks_of_the_harness_are_known():
    assert said("hellaswag", "mmlu", "mmlu_*", "arc_easy", "leaderboard", "ai2_arc", path=None) == []


@pytest.mark.parametrize(
    ("wanted", "words"),
    [
        (("choise",), "tasks: got 'choise', which is no task.*tasks of .*similar: choice"),
        (("nothing_*",), "tasks: got 'nothing_*', which is no task"),
        (("choice", "choice"), "tasks: got choice twice; allowed: each task once"),
        ((), r"tasks: got nothing; allowed: names of tasks; give tasks=\["),
    ],
)
def test_wrong_names(wanted: tuple[str, ...], words: str, tasks: Path):
    import re

    (problem,) = said(*wanted, path=tasks)
    assert re.match(words.replace("_*'", r"_\*'"), problem)


def test_a_name_that_is_nearly_one_of_the_harness():
    (problem,) = said("helaswag", path=None)
    assert "hellaswag" in problem


@pytest.mark.parametrize(
    ("name", "words"), [("none", "no such folder"), ("file", "a file"), ("empty", "which has no .yaml file")]
)
def test_a_folder_without_tasks(name: str, words: str, tmp_path: Path):
    (tmp_path / "empty").mkdir()
    (tmp_path / "file").write_text("")
    (problem,) = said("choice", path=tmp_path / name)
    assert problem.startswith("tasks_path: got")
    assert f"{words}; allowed: a folder with a .yaml file" in problem


def test_without_the_harness(tasks: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(names, "MODULE", "lm_eval_that_is_not_there")
    (problem,) = said("choice", path=tasks)
    assert problem.endswith("which is not installed; pip install 'llmtrain[harness]'")
