"""Prompts: templates in tokens, the scores of answers, and the choice of shots."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from llmtrain.data.datasets.prompts import NO_TOKEN, fit
from llmtrain.objectives.prompt_template import Piece, parse
from llmtrain.objectives.prompted import PromptedConfig, answer_scores
from llmtrain.objectives.shots import chosen_rows


def test_a_template_keeps_spaces_with_the_words_after_them() -> None:
    template = parse("Review: {text}\nIt was {answer} by {author}.")
    assert template.before == (Piece("", "Review:"), Piece(" ", field="text"), Piece("", "\nIt was"))
    assert template.space == " "
    assert template.after == (Piece(" ", "by"), Piece(" ", field="author"), Piece("", "."))
    assert template.fields == ("text", "author")
    assert parse("{a} {b}{answer}").before == (Piece("", field="a"), Piece(" ", field="b"))


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("{text} it was", "no {answer}"),
        ("{answer} {text} {answer}", "{answer} 2 times"),
        ("It was {answer}", "no field"),
        ("{text} {answer", "expected"),
        ("{} {answer}", "{} without a name"),
        ("{text:>3} {answer}", "{text} with a format"),
    ],
)
def test_what_is_no_template(text: str, said: str) -> None:
    [problem] = PromptedConfig(template=text, verbalizer={"0": "bad", "1": "good"}).problems()
    assert problem.where == "template"
    assert said in problem.got


def test_the_longest_fields_are_cut_first() -> None:
    assert fit([3, 10, 5], 30) == [3, 10, 5]
    assert fit([3, 10, 5], 12) == [3, 5, 4]
    assert fit([3, 10, 5], 3) == [1, 1, 1]
    assert fit([8], 5) == [5]
    for room in range(1, 40):
        kept = fit([7, 1, 19, 12], room)
        assert sum(kept) == min(room, 39)
        assert all(a <= b for a, b in zip(kept, [7, 1, 19, 12], strict=True))


def test_scores_are_the_sums_over_the_tokens_of_each_answer() -> None:
    torch.manual_seed(0)
    answers = torch.tensor([[[3, 5], [4, NO_TOKEN]], [[3, 5], [4, NO_TOKEN]]])
    logits = torch.randn(4, 2, 7)
    scores = answer_scores(logits, answers)
    said = logits.log_softmax(-1)
    for sample in range(2):
        first, second = said[2 * sample], said[2 * sample + 1]
        torch.testing.assert_close(scores[sample, 0], first[0, 3] + first[1, 5])
        torch.testing.assert_close(scores[sample, 1], second[0, 4])
    one = answer_scores(logits[:2, :1], answers[..., :1])
    torch.testing.assert_close(one.softmax(-1), said[:2, 0][:, [3, 4]].softmax(-1))


def test_shots_take_the_labels_in_turn() -> None:
    labels = np.array([0] * 90 + [1] * 10)
    rows = chosen_rows(labels, 12, seed=3)
    assert len(set(rows.tolist())) == 12
    assert (labels[rows] == 1).sum() == 6
    assert (chosen_rows(labels, 12, seed=3) == rows).all()
    assert (chosen_rows(labels, 12, seed=4) != rows).any()
    assert (labels[chosen_rows(labels, 40, seed=0)] == 1).sum() == 10
    assert len(chosen_rows(labels, 200, seed=0)) == 100
    others = chosen_rows(labels, 6, seed=3, skip=12)
    assert not set(others.tolist()) & set(rows.tolist())
    assert (labels[others] == 1).sum() == 3
