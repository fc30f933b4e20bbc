"""Every layout trains the model that one process trains; see matrix.py for cells and tolerances."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.parity.matrix import (
    CELLS,
    TURNS,
    Cell,
    Matrix,
    covered,
    part_of_matrix,
    readme_table,
)
from tests.support.turns import this_turn


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    if "cell" in metafunc.fixturenames:
        metafunc.parametrize("cell", cells_of_this_run(metafunc.config), ids=lambda cell: cell.id)


def cells_of_this_run(config: pytest.Config) -> list[Cell]:
    return list(CELLS) if config.getoption("--whole-matrix") else part_of_matrix(this_turn())


@pytest.fixture(scope="module")
def matrix(corpus: Path, paired_corpus: Path, pytestconfig: pytest.Config) -> Matrix:
    return Matrix(corpus, paired_corpus, cells_of_this_run(pytestconfig))


@pytest.mark.slow
def test_equals_one_process(matrix: Matrix, cell: Cell):
    found = matrix.result(cell)
    assert found.within(cell.tolerance), found


@pytest.mark.slow
def test_the_readme_shows_what_was_found(matrix: Matrix):
    assert readme_table() == matrix.table(), "python -m tests.parity.matrix --write"


def test_parts_in_turn_are_the_whole_matrix():
    parts = [set(part_of_matrix(turn)) for turn in range(100, 100 + TURNS)]
    assert set().union(*parts) == set(CELLS)
    assert max(map(len, parts)) < 0.3 * len(CELLS)


@pytest.mark.parametrize("turn", range(TURNS))
def test_each_part_has_every_pair_of_values(turn: int):
    part = part_of_matrix(turn)
    assert set().union(*map(covered, part)) == set().union(*map(covered, CELLS))
    assert sum(cell.ranks for cell in part) < 0.3 * sum(cell.ranks for cell in CELLS)
