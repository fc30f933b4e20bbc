"""What a user is told: one line, whatever the names in it hold."""

from __future__ import annotations

import pytest

from llmtrain.errors import Problem, printable


@pytest.mark.parametrize(
    ("name", "shown"),
    [
        ("train/a.txt", "train/a.txt"),
        ("naïve 漢字 😀", "naïve 漢字 😀"),
        ("\x1b]0;title\x07", r"\x1b]0;title\x07"),
        ("\x9b2J", r"\x9b2J"),
        ("a\x00b\x7f", r"a\x00b\x7f"),
        ("txt.\u202egnp", r"txt.\u202egnp"),
        ("\ud800", r"\ud800"),
        ("not UTF-8: \udcff", "not UTF-8: \udcff"),
    ],
)
def test_a_name_is_shown_without_what_steers_a_terminal(name, shown):
    assert printable(name) == shown


def test_a_problem_is_one_printable_line():
    problem = Problem("a\nb", "\x1b[31mred", "c\rd", "e\x1bf")
    assert str(problem) == r"a b: got \x1b[31mred; allowed: c d; e\x1bf"
