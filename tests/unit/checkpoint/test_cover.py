"""Whether boxes cover a matrix exactly once."""

from __future__ import annotations

import itertools

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from llmtrain.checkpoint.cover import cover_problem
from llmtrain.tensor_boxes import Box, Shard, whole


@pytest.mark.parametrize(
    ("boxes", "words"),
    [
        ([(0, 0, 4, 6)], None),
        ([(0, 0, 2, 6), (2, 0, 2, 3), (2, 3, 2, 3)], None),
        ([(0, 0, 4, 2), (0, 2, 1, 4), (1, 2, 3, 4)], None),
        ([], "24 of 24 elements are in no box"),
        ([(0, 0, 4, 5)], "4 of 24 elements are in no box"),
        ([(0, 0, 4, 6), (3, 5, 1, 1)], "row 3 are in two boxes"),
        ([(0, 0, 4, 6), (0, 0, 4, 6)], "in two boxes"),
        ([(0, 0, 3, 6), (2, 0, 2, 6)], "row 2 are in two boxes"),
        ([(0, 0, 4, 7)], "not within"),
        ([(0, 0, 4, 6), (1, 1, 0, 2)], "not within"),
    ],
)
def test_cover(boxes: list[tuple[int, int, int, int]], words: str | None):
    found = cover_problem(Box(0, 0, 4, 6), [Box(*box) for box in boxes])
    assert found is None if words is None else words in str(found)


BOXES = st.lists(
    st.tuples(st.integers(0, 3), st.integers(0, 3), st.integers(1, 4), st.integers(1, 4)), max_size=6
)


@given(BOXES)
def test_it_agrees_with_counting(boxes: list[tuple[int, int, int, int]]):
    counts = np.zeros((8, 8), dtype=int)
    for row, column, rows, columns in boxes:
        counts[row : row + rows, column : column + columns] += 1
    inside = not counts[4:].any() and not counts[:, 4:].any()
    exact = inside and bool((counts[:4, :4] == 1).all())
    assert (cover_problem(Box(0, 0, 4, 4), [Box(*box) for box in boxes]) is None) == exact


@given(
    st.tuples(st.integers(1, 9), st.integers(1, 9)),
    st.integers(0, 1),
    st.integers(1, 4),
    st.lists(st.integers(0, 80), max_size=4),
)
def test_shards_and_flat_ranges_cover(shape: tuple[int, int], dim: int, count: int, cuts: list[int]):
    boxes = []
    for index in range(count):
        shard = Shard(shape, dim, index, count)
        ends = sorted({0, shard.numel, *(cut for cut in cuts if cut < shard.numel)})
        for start, stop in itertools.pairwise(ends):
            boxes += [box for box, _ in shard.pieces(start, stop)]
    assert cover_problem(whole(shape), boxes) is None
