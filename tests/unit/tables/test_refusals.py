"""What a table may hold that no task can learn from: one line each, and no cache of it."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

import pytest

from llmtrain.errors import DataError
from llmtrain.objectives.classification import ClassificationConfig
from llmtrain.objectives.question_answering import QuestionAnsweringConfig
from llmtrain.objectives.regression import RegressionConfig
from llmtrain.objectives.tagging import TaggingConfig
from llmtrain.tables import build
from llmtrain.tables.config import TableCacheConfig, TableDataConfig
from llmtrain.tables.table import open_table

ONE, SEVERAL = ClassificationConfig(), ClassificationConfig(multi_label=True)
GOOD = [{"text": f"a film of {number} men", "label": "ab"[number % 2]} for number in range(40)]
TAGGED = [{"text": ["a", "film"], "label": ["O", "B-X"]} for _ in range(40)]
ASKED = [
    {"question": "what?", "context": f"a film of {number} men", "answers": [{"text": "film"}]}
    for number in range(40)
]


def changed(rows: list[dict[str, Any]], **values: Any) -> list[dict[str, Any]]:
    """The rows with other values in the seventh."""
    return [*rows[:6], {**rows[6], **values}, *rows[7:]]


def everywhere(rows: list[dict[str, Any]], **values: Any) -> list[dict[str, Any]]:
    return [{**row, **values} for row in rows]


@pytest.mark.parametrize(
    ("task", "rows", "said"),
    [
        (ONE, [], "rows.jsonl: got an empty file"),
        (ONE, everywhere(GOOD, text=" "), "rows.jsonl: got no row with text; allowed: rows with text in"),
        (ONE, [*GOOD[:6], {"text": "x"}], "line 7: got no field label; allowed: text"),
        (ONE, everywhere(GOOD, label="a"), "got one label only, a, in"),
        (SEVERAL, everywhere(GOOD, label=["a"]), "got one label only, a, in"),
        (SEVERAL, everywhere(GOOD, label=[]), "got no label in any of"),
        (
            SEVERAL,
            changed(GOOD, label=3),
            "line 7: got a number in the field label; allowed: a list of labels",
        ),
        (
            ONE,
            [{"text": r["label"], "label": r["text"]} for r in GOOD],
            "data.text_field and data.label_field sw",
        ),
        (ONE, [{"text": "a", "label": f"text {n}"} for n in range(12)], "data.label_field swapped"),
        (ONE, changed(GOOD, label=float("nan")), "line 7: got NaN in the field label; allowed: a label"),
        (ONE, changed(GOOD, label=" NaN"), "line 7: got NaN in the field label"),
        (ONE, changed(GOOD, label=None), "line 7: got nothing in the field label"),
        (ONE, changed(GOOD, label=""), "line 7: got nothing in the field label"),
        (ONE, changed(GOOD, label={"a": 1}), "line 7: got an object in the field label"),
        (ONE, changed(GOOD, text={"a": 1}), "line 7: got an object in the field text"),
        (RegressionConfig(), GOOD, "line 1: got 'a' in the field label; allowed: a number"),
        (RegressionConfig(), everywhere(GOOD, label=3), "got the same number, 3, in all"),
        (
            RegressionConfig(),
            changed(everywhere(GOOD, label=1), label=None),
            "line 7: got nothing in the field",
        ),
        (RegressionConfig(), changed(everywhere(GOOD, label=1), label=10**400), "line 7: got inf in the"),
        (
            RegressionConfig(),
            changed(everywhere(GOOD, label=1), label=float("nan")),
            "line 7: got nan in the",
        ),
        (
            RegressionConfig(),
            changed(everywhere(GOOD, label=1), label="1e30"),
            "line 7: got 1e+30 in the field",
        ),
        (TaggingConfig(), changed(TAGGED, label=["O"]), "line 7: got 2 words and 1 tags"),
        (TaggingConfig(), changed(TAGGED, label=None), "line 7: got nothing in the field label"),
        (TaggingConfig(), everywhere(TAGGED, label=["O", "O"]), "got one tag only, O"),
        (
            QuestionAnsweringConfig(),
            changed(ASKED, answers=["dog"]),
            "line 7: got the answer 'dog', which is",
        ),
        (
            QuestionAnsweringConfig(),
            changed(ASKED, answers=[{"text": "film", "answer_start": "2"}]),
            "line 7: got answer_start='2'",
        ),
        (
            QuestionAnsweringConfig(),
            changed(ASKED, answers={"text": ["film"], "answer_start": [2, 3]}),
            "line 7: got answers whose text and answer_start are no lists of one length",
        ),
        (QuestionAnsweringConfig(), everywhere(ASKED, answers=[]), "got no answer in any of"),
    ],
)
def test_one_line_and_no_cache(
    task: Any, rows: list[dict[str, Any]], said: str, corpus: Path, tmp_path: Path
) -> None:
    path = tmp_path / "rows.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    with pytest.raises(DataError) as caught:
        opened(path, task, corpus)
    [problem] = caught.value.problems
    assert said in str(problem)
    assert "\n" not in str(problem)
    assert nothing_left(tmp_path)


def opened(path: Path, task: Any, corpus: Path) -> None:
    cache = TableCacheConfig(path.parent / "cache")
    open_table(TableDataConfig(str(path), tokenizer=corpus, cache=cache), task, None)


def nothing_left(folder: Path) -> bool:
    return all(name.endswith(".lock") for name in os.listdir(folder / "cache"))


def test_a_file_that_changes_while_it_is_read_is_refused(
    corpus: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "rows.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in GOOD))
    read = build.read_records

    def meanwhile(*arguments: Any, **keys: Any) -> Any:
        yield from read(*arguments, **keys)
        with open(path, "a") as file:
            file.write(json.dumps(GOOD[0]) + "\n")

    monkeypatch.setattr(build, "read_records", meanwhile)
    with pytest.raises(DataError, match=r"rows\.jsonl: got a file that changed while it was read"):
        opened(path, ONE, corpus)
    assert nothing_left(tmp_path)
    monkeypatch.undo()
    opened(path, ONE, corpus)
