"""Windows of long contexts, the span of an answer in them, and answers over several windows."""

from __future__ import annotations

import json
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from llmtrain.data.datasets.answer_windows import AnswerWindows
from llmtrain.errors import DataError
from llmtrain.labels import IGNORE_INDEX
from llmtrain.models.bert.config import BertConfig
from llmtrain.objectives.question_answering import QuestionAnswering, QuestionAnsweringConfig
from llmtrain.scoring.answers import answer_figures, exact_match, overlap
from llmtrain.tables.config import TableCacheConfig, TableDataConfig
from llmtrain.tables.table import Table, open_table

WORDS = ["the", "film", "was", "a", "fine", "old", "tale", "of", "two", "men", "and", "one", "dog", "größer"]
T = 32


def rows(count: int) -> list[dict[str, Any]]:
    draw, made = np.random.default_rng(0), []
    for number in range(count):
        words = list(draw.choice(WORDS, draw.integers(5, 60)))
        at = int(draw.integers(0, len(words)))
        words[at] = f"Answer{number}"
        context = " ".join(words)
        answers = [{"text": words[at], "answer_start": context.index(words[at])}] if number % 5 else []
        made.append({"question": "Who was it?", "context": context, "answers": answers})
    return made


def opened(made: list[dict[str, Any]], corpus: Path, tmp_path: Path) -> Table:
    path = tmp_path / "squad.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in made))
    cache = TableCacheConfig(tmp_path / "cache")
    data = TableDataConfig(train=str(path), tokenizer=corpus, cache=cache)
    return open_table(data, QuestionAnsweringConfig(), None)


@pytest.fixture
def windows(corpus: Path, tmp_path: Path) -> AnswerWindows:
    table = opened(rows(60), corpus, tmp_path)
    config = QuestionAnsweringConfig(overlap=8)
    model, _, _ = config.special_ids(config.fitted(BertConfig(num_heads=12)), table)
    return config.examples_of_split(model, table.split("train"), table.load_tokenizer(), T, 64)


def test_windows_cover_each_context_and_share_tokens(windows: AnswerWindows) -> None:
    lengths = windows.split.columns["second"].lengths  # type: ignore[union-attr]
    assert windows.lengths.max() <= T
    for row, length in enumerate(lengths.tolist()):
        own = np.flatnonzero(windows.rows == row)
        assert windows.begins[own[0]] == 0
        assert windows.ends[own[-1]] == length
        for one, next_one in pairwise(own):
            assert windows.ends[one] - windows.begins[next_one] == 8


def test_the_span_is_the_answer_wherever_a_window_holds_it(windows: AnswerWindows, corpus: Path) -> None:
    raw = windows.get(np.arange(len(windows)))
    held = {}
    for window, (first, last) in enumerate(raw["span"].tolist()):
        row, at = int(windows.rows[window]), windows.context_at(window)
        if last == 0:
            continue
        offsets = windows.split.columns["offsets"][row].reshape(-1, 2)
        begin = int(windows.begins[window])
        start, end = offsets[first - at + begin, 0], offsets[last - at + begin, 1]
        context = windows.split.columns["context"].text(row)  # type: ignore[union-attr]
        [[answer, _]] = json.loads(windows.split.columns["answers"].text(row))  # type: ignore[union-attr]
        assert context[start:end].strip() == answer
        held[row] = True
    answers = windows.split.columns["answers"]
    answered = {row for row in range(len(windows.split)) if json.loads(answers.text(row))}  # type: ignore[union-attr]
    assert set(held) == answered, "each answer is whole in some window"
    assert (windows.get(np.array([-1]))["span"] == IGNORE_INDEX).all()


def test_the_best_span_of_all_windows_is_the_answer(windows: AnswerWindows) -> None:
    """Scores that are high at the right tokens give the answers, and "no answer" where there is none."""
    config = QuestionAnsweringConfig(overlap=8)
    import torch

    from llmtrain.nn.task_config import TaskHeadConfig

    objective = QuestionAnswering(BertConfig(task=TaskHeadConfig("span", 2)), config)
    raw = windows.get(np.arange(len(windows)))
    batch = objective.collate({**raw, "keys": np.arange(len(windows))})
    logits = torch.randn(len(windows), batch["tokens"].shape[1], 2) * 0.1
    for window, (first, last) in enumerate(raw["span"].tolist()):
        logits[window, first, 0] += 5
        logits[window, last, 1] += 5
    found = dict(enumerate(objective.predictions(logits, batch)))
    said = objective.answers(windows, found)
    for row, (text, probability) in said.items():
        given = json.loads(windows.split.columns["answers"].text(row))  # type: ignore[union-attr]
        assert text == (given[0][0] if given else ""), row
        assert 0 < probability <= 1
    figures = objective.scores(windows, found)
    assert figures["exact_match"].value == 1.0
    assert figures["answered_f1"].value == 1.0


@pytest.mark.parametrize(
    ("said", "answers", "exact", "shared"),
    [
        ("The Eiffel Tower!", ["eiffel tower"], 1.0, 1.0),
        ("tower", ["the Eiffel Tower", "a tower"], 1.0, 1.0),
        ("the tall Eiffel Tower", ["Eiffel Tower"], 0.0, 0.8),
        ("", [], 1.0, 1.0),
        ("Paris", [], 0.0, 0.0),
        ("", ["Paris"], 0.0, 0.0),
    ],
)
def test_answers_are_compared_as_squad_does(
    said: str, answers: list[str], exact: float, shared: float
) -> None:
    assert exact_match(said, answers) == exact
    assert overlap(said, answers) == pytest.approx(shared)


def test_an_interval_of_answers() -> None:
    figures = answer_figures(["a b"] * 50 + ["c"] * 50, [["a b"]] * 100)
    assert figures["exact_match"].value == 0.5
    assert 0.35 < figures["exact_match"].low < 0.5 < figures["exact_match"].high < 0.65


def test_an_answer_that_is_not_in_its_context_is_refused(corpus: Path, tmp_path: Path) -> None:
    made = rows(3)
    made[1]["answers"] = [{"text": "Paris", "answer_start": 3}]
    with pytest.raises(DataError, match=r"line 2: got the answer 'Paris', which is not in its context"):
        opened(made, corpus, tmp_path)
