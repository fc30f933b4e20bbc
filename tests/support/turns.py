"""Long lists of cases that a run takes in turn: a part after each commit, all of them within a few commits.

    @pytest.mark.in_turns(3)               # a third of the cases that its parametrizations give
    @pytest.mark.in_turns(3, by="layout")  # those of a third of the layouts

The same commit always runs the same part. `pytest --whole-matrix` and LLMTRAIN_MATRIX=all run every case; so
does a run that names its tests (`file.py::test`).
"""

from __future__ import annotations

import subprocess
import zlib
from collections.abc import Sequence

import pytest

from tests.support.training import REPOSITORY

WHOLE = "LLMTRAIN_MATRIX"
"""Variable that is `all` where every case is to run."""


def of_turn(cases: Sequence[str], every: int, turn: int) -> list[str]:
    """Return one of `every` parts of the cases; `every` turns in a row give all.

    Parts are drawn by the hash of the names: neighbors in a list often differ in one axis alone, and a part
    must not be all that has one value of it.
    """
    return sorted(cases, key=lambda case: zlib.crc32(case.encode()))[turn % every :: every]


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
    in_turns: dict[tuple[str, int], dict[str, list[pytest.Item]]] = {}
    for item in items:
        mark = item.get_closest_marker("in_turns")
        if mark is not None:
            group = item.nodeid.partition("[")[0], mark.args[0]
            in_turns.setdefault(group, {}).setdefault(_case(item, **mark.kwargs), []).append(item)
    turn = this_turn() if in_turns else 0
    left_out = {
        item
        for (_, every), cases in in_turns.items()
        for case in set(cases).difference(of_turn(list(cases), every, turn))
        for item in cases[case]
    }
    config.hook.pytest_deselected(items=[item for item in items if item in left_out])
    items[:] = [item for item in items if item not in left_out]


def _case(item: pytest.Item, by: str | None = None) -> str:
    """What takes turns: the value of the parameter `by`, or all parameters."""
    return item.nodeid.partition("[")[2] if by is None else str(item.callspec.params[by])  # type: ignore[attr-defined]
