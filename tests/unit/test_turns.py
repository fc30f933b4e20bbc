"""Cases that take turns are all run within a few commits, each commit's part the same every time."""

from __future__ import annotations

from itertools import product
from types import SimpleNamespace
from typing import Any

import pytest

from tests.support import turns


class Item:
    """As much of a collected test as turns look at."""

    def __init__(self, test: str, mark: pytest.Mark | None, **params: object) -> None:
        self.nodeid = f"test_some.py::{test}[{'-'.join(map(str, params.values()))}]"
        self.callspec = SimpleNamespace(params=params)
        self._mark = mark

    def get_closest_marker(self, name: str) -> pytest.Mark | None:
        return self._mark if name == "in_turns" else None


def items() -> list[Item]:
    sizes_and_names = list(product((1, 2), "abc"))
    by_all, by_name = pytest.mark.in_turns(3).mark, pytest.mark.in_turns(3, by="name").mark
    return [
        *[Item("test_each", by_all, name=name, size=size) for size, name in sizes_and_names],
        *[Item("test_by_name", by_name, name=name, size=size) for size, name in sizes_and_names],
        Item("test_always", None, name="a"),
    ]


def chosen(turn: int, monkeypatch: pytest.MonkeyPatch, is_whole: bool = False, *arguments: str) -> set[str]:
    """Node ids of a run's tests."""
    monkeypatch.setattr(turns, "this_turn", lambda: turn)
    found: list[Any] = items()
    left_out: list[Any] = []
    hook = SimpleNamespace(pytest_deselected=lambda items: left_out.extend(items))
    config: Any = SimpleNamespace(getoption=lambda name: is_whole, args=arguments or ["tests"], hook=hook)
    turns.take_part(config, found)
    assert len(found) + len(left_out) == len(items())
    return {item.nodeid for item in found}


def test_turns_in_a_row_give_every_case_once(monkeypatch: pytest.MonkeyPatch):
    whole = {item.nodeid for item in items()}
    assert chosen(7, monkeypatch, True) == whole
    assert chosen(7, monkeypatch, False, "test_some.py::test_each") == whole
    parts = [chosen(turn, monkeypatch) for turn in (7, 8, 9)]
    assert chosen(7, monkeypatch) == parts[0], "the same turn gives the same part"
    assert set.union(*parts) == whole
    assert set.intersection(*parts) == {"test_some.py::test_always[a]"}
    for part in parts:
        assert len(part) == 2 + 2 + 1
        (name,) = {test.split("[")[1].split("-")[0] for test in part if "by_name" in test}
        assert {f"test_some.py::test_by_name[{name}-{size}]" for size in (1, 2)} <= part


def test_parts_are_of_equal_size_and_mixed():
    cases = [f"{family}-{precision}" for family in range(20) for precision in ("fp32", "bf16")]
    parts = [turns.of_turn(cases, 3, turn) for turn in range(11, 14)]
    assert sorted(case for part in parts for case in part) == sorted(cases)
    assert {len(part) for part in parts} == {13, 14}
    for part in parts:
        assert {case.split("-")[1] for case in part} == {"fp32", "bf16"}
