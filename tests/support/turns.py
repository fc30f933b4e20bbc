"""Long lists of cases that a run takes in turn: a part after each commit, all of them within a few commits.

    @pytest.mark.in_turns(3)          # a third of the cases of all its parametrizations
    @pytest.mark.parametrize(…)
    def test_…

The same commit always runs the same part. `pytest --whole-matrix` and LLMTRAIN_MATRIX=all run every case; so
does a run that names its tests (`file.py::test`).
"""

from __future__ import annotations

import os
import subprocess
import zlib
from collections import defaultdict
from collections.abc import Callable, Sequence
from typing import TypeVar

import pytest

from tests.support.training import REPOSITORY

WHOLE = "LLMTRAIN_MATRIX"
"""Variable that is `all` where every case is to run."""
Case = TypeVar("Case")


def of_turn(cases: Sequence[Case], every: int, turn: int, name: Callable[[Case], str]) -> list[Case]:
    """Return one of `every` parts of the cases, in their order; `every` turns in a row give all.

    A part is drawn by the hash of the names: neighbors in a list often differ in one axis alone, and a part
    must not be all that has one value of it.
    """
    drawn = sorted(cases, key=lambda case: zlib.crc32(name(case).encode()))
    chosen = {name(case) for case in drawn[turn % every :: every]}
    return [case for case in cases if name(case) in chosen]


def this_turn() -> int:
    """The number of commits so far, so that the parts come in turn; without the history, a number from the
    commit's hash; without git, 0."""

    def git(*arguments: str) -> str:
        done = subprocess.run(["git", "-C", str(REPOSITORY), *arguments], capture_output=True, text=True)
        return done.stdout.strip() if done.returncode == 0 else ""

    try:
        if git("rev-parse", "--is-shallow-repository") == "false":
            return int(git("rev-list", "--count", "HEAD") or 0)
        return int(git("rev-parse", "HEAD") or "0", 16)
    except FileNotFoundError:
        return 0


def take_part(config: pytest.Config, items: list[pytest.Item]) -> None:
    """Leave out the items with a mark `in_turns` whose turn it is not."""
    if config.getoption("--whole-matrix") or any("::" in argument for argument in config.args):
        return
    in_turns: dict[tuple[str, int], list[pytest.Item]] = defaultdict(list)
    for item in items:
        mark = item.get_closest_marker("in_turns")
        if mark is not None:
            test, _, _ = item.nodeid.partition("[")
            in_turns[test, mark.args[0]].append(item)
    if not in_turns:
        return
    turn = this_turn()
    left_out = {
        item
        for (_, every), cases in in_turns.items()
        for item in set(cases).difference(of_turn(cases, every, turn, lambda item: item.nodeid))
    }
    config.hook.pytest_deselected(items=[item for item in items if item in left_out])
    items[:] = [item for item in items if item not in left_out]
