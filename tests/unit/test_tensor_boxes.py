"""Boxes cover each element of the whole exactly once, whatever the division."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from llmtrain.tensor_boxes import Box, Shard, matrix_shape, whole

SHAPES = st.one_of(
    st.tuples(st.integers(1, 9)),
    st.tuples(st.integers(1, 9), st.integers(1, 9)),
    st.tuples(st.integers(1, 5), st.integers(1, 4), st.integers(1, 3)),
)


def take(matrix: np.ndarray, box: Box) -> np.ndarray:
    return matrix[box.row : box.row + box.rows, box.column : box.column + box.columns]


@given(shape=SHAPES, count=st.integers(1, 4), dim=st.integers(0, 1), ranks=st.integers(1, 5))
def test_parts_of_parts_cover_the_whole_once(shape: tuple[int, ...], count: int, dim: int, ranks: int):
    if dim == 1 and len(shape) != 2:
        dim = 0
    values = np.arange(int(np.prod(shape))).reshape(matrix_shape(shape))
    seen = np.zeros_like(values)
    for index in range(count):
        shard = Shard(shape, dim, index, count)
        local = local_part(values.reshape(shape), shard)
        share = -(-shard.numel // ranks)
        for rank in range(ranks):
            start, stop = min(shard.numel, rank * share), min(shard.numel, (rank + 1) * share)
            flat = local.reshape(-1)[start:stop]
            boxes = list(shard.pieces(start, stop))
            for box, place in boxes:
                np.testing.assert_array_equal(flat[place].reshape(box.rows, box.columns), take(values, box))
                take(seen, box)[...] += 1
    np.testing.assert_array_equal(seen, 1)


def local_part(values: np.ndarray, shard: Shard) -> np.ndarray:
    """The part as tensor parallelism holds it, padding −1."""
    part = shard.local_shape[shard.dim]
    pad = [(0, 0)] * values.ndim
    pad[shard.dim] = (0, part * shard.count - values.shape[shard.dim])
    padded = np.pad(values, pad, constant_values=-1)
    return padded.take(range(shard.index * part, (shard.index + 1) * part), axis=shard.dim)


def test_a_flat_range_of_a_shard_is_three_boxes_at_most():
    shard = Shard((8, 12), dim=1, index=1, count=3)
    boxes = [box for box, _ in shard.pieces(2, 27)]
    assert boxes == [Box(0, 6, 1, 2), Box(1, 4, 5, 4), Box(6, 4, 1, 3)]


def test_matrix_shapes():
    assert matrix_shape(()) == (1, 1)
    assert matrix_shape((5,)) == (1, 5)
    assert matrix_shape((5, 2, 3)) == (5, 6)
    assert whole((4, 2)) == Box(0, 0, 4, 2)


def test_ranges_outside_are_refused():
    with pytest.raises(ValueError, match="elements 0 to 5 of 4"):
        list(Shard((4,)).pieces(0, 5))
