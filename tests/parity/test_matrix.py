"""Every layout trains the model that one process trains; see matrix.py for cells and tolerances."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.parity.matrix import CELLS, Cell, Matrix, readme_table

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def matrix(corpus: Path, paired_corpus: Path) -> Matrix:
    return Matrix(corpus, paired_corpus)


@pytest.mark.parametrize("cell", CELLS, ids=lambda cell: cell.id)
def test_equals_one_process(matrix: Matrix, cell: Cell):
    found = matrix.result(cell)
    assert found.within(cell.tolerance), found


def test_the_readme_shows_what_was_found(matrix: Matrix):
    assert readme_table() == matrix.table(), "python -m tests.parity.matrix --write"
