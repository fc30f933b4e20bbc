"""Best fit over groups of alike documents against best fit one document at a time."""

from __future__ import annotations

import itertools
import random
from bisect import bisect_left, insort

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from llmtrain.data.datasets.packing import Rows, best_fit, count_rows

LENGTHS = st.lists(st.integers(0, 40), max_size=60)


@st.composite
def widths_and_overlaps(draw: st.DrawFn) -> tuple[int, int]:
    width = draw(st.integers(2, 24))
    return width, draw(st.integers(1, width - 1))


def pack(lengths: list[int], width: int, overlap: int = 1) -> Rows:
    return best_fit(np.array(lengths, dtype=np.int64), width, overlap)


def pieces_of_rows(rows: Rows) -> list[list[tuple[int, int, int]]]:
    """(start, length, context) of each piece of each row."""
    pieces = list(zip(rows.starts.tolist(), rows.lengths.tolist(), rows.contexts.tolist(), strict=True))
    borders = rows.first_piece.tolist()
    return [pieces[start:end] for start, end in itertools.pairwise(borders)]


def one_at_a_time(lengths: list[int], width: int) -> list[int]:
    """Tokens of each row, ascending, of best fit as it is written in books."""
    rooms: list[int] = []
    for length in sorted(lengths, reverse=True):
        place = bisect_left(rooms, length)
        room = rooms.pop(place) if place < len(rooms) else width
        insort(rooms, room - length)
    return sorted(width - room for room in rooms)


def test_by_hand() -> None:
    """Documents of 9, 3, 1, 4, 2 and 6 tokens in rows of 6, the long one's pieces sharing 2."""
    rows = pack([9, 3, 1, 4, 2, 6], width=6, overlap=2)
    assert pieces_of_rows(rows) == [
        [(0, 6, 1)],  # the longest first: 6 of the 9,
        [(19, 6, 1)],  # and the document of 6
        [(4, 5, 2)],  # what remains of the 9, and what it shares
        [(13, 4, 1), (17, 2, 1)],
        [(9, 3, 1)],
    ]
    assert [rows.first_piece.dtype, rows.starts.dtype] == [np.int64] * 2
    assert [rows.lengths.dtype, rows.contexts.dtype] == [np.int32] * 2


@given(LENGTHS, widths_and_overlaps())
def test_each_token_but_a_documents_first_is_a_target_once(
    lengths: list[int], sizes: tuple[int, int]
) -> None:
    rows = pack(lengths, *sizes)
    ends = np.cumsum(lengths, dtype=np.int64)
    times_a_target = np.zeros(sum(lengths), dtype=int)
    for start, length, context in zip(rows.starts, rows.lengths, rows.contexts, strict=True):
        # A piece is of one document.
        assert np.searchsorted(ends, start, "right") == np.searchsorted(ends, start + length - 1, "right")
        times_a_target[start + context : start + length] += 1
    expected = np.ones(sum(lengths), dtype=int)
    expected[[end - length for end, length in zip(ends, lengths, strict=True) if length]] = 0
    assert times_a_target.tolist() == expected.tolist()


@given(LENGTHS, widths_and_overlaps())
def test_what_is_seen_again_is_the_overlap(lengths: list[int], sizes: tuple[int, int]) -> None:
    width, overlap = sizes
    rows = pack(lengths, *sizes)
    starts_of_documents = {sum(lengths[:i]) for i in range(len(lengths))}
    for start, length, context in zip(rows.starts, rows.lengths, rows.contexts, strict=True):
        assert context == (1 if int(start) in starts_of_documents else overlap)
        assert context < length <= width


@given(LENGTHS, widths_and_overlaps())
def test_rows_are_those_of_best_fit_one_at_a_time(lengths: list[int], sizes: tuple[int, int]) -> None:
    width, overlap = sizes
    rows = pack(lengths, width, overlap)
    by_row = pieces_of_rows(rows)
    filled = sorted(sum(length for _, length, _ in row) for row in by_row)
    assert filled == one_at_a_time(rows.lengths.tolist(), width)
    assert all(row and row == sorted(row) for row in by_row)
    assert max(filled, default=0) <= width
    assert len(rows) == len(by_row)
    assert count_rows(np.array(lengths, dtype=np.int64), width, overlap) == (len(rows), sum(filled))


@given(LENGTHS, widths_and_overlaps(), st.randoms(use_true_random=False))
def test_the_number_of_rows_does_not_depend_on_the_documents_order(
    lengths: list[int], sizes: tuple[int, int], source: random.Random
) -> None:
    shuffled = lengths.copy()
    source.shuffle(shuffled)
    assert len(pack(shuffled, *sizes)) == len(pack(lengths, *sizes))


@pytest.mark.parametrize("width", [65, 257, 1025])
def test_texts_leave_little_room(width: int) -> None:
    """Documents of log-normal lengths, as texts have them: under 1 % of padding, and no more rows than
    first fit makes of the same pieces."""
    lengths = np.random.default_rng(width).lognormal(4.5, 1.0, 3000).astype(np.int64) + 1
    rows = best_fit(lengths, width)
    assert 1 - rows.lengths.sum() / (len(rows) * width) < 0.01
    rooms = np.zeros(0, dtype=np.int64)
    for length in rows.lengths[np.argsort(rows.starts)]:
        fitting = np.flatnonzero(rooms >= length)
        if len(fitting):
            rooms[fitting[0]] -= length
        else:
            rooms = np.append(rooms, width - length)
    assert len(rows) <= len(rooms)


def test_documents_without_targets_are_left_out() -> None:
    rows = pack([1, 0, 1], width=4)
    assert (len(rows), rows.first_piece.tolist(), len(rows.starts)) == (0, [0], 0)
    assert count_rows(np.array([1, 0, 1]), 4) == (0, 0)
    assert pieces_of_rows(pack([1, 3, 1], width=4)) == [[(1, 3, 1)]]


@pytest.mark.parametrize("dtype", [np.uint16, np.int32, np.uint32, np.uint64])
def test_lengths_of_any_integers(dtype: type) -> None:
    lengths = [60_000, 60_000, 7]
    rows = best_fit(np.array(lengths, dtype=dtype), 50_000)
    assert sorted(pieces_of_rows(rows)) == sorted(pieces_of_rows(pack(lengths, 50_000)))
    assert int(rows.starts.max()) == 120_000


@pytest.mark.parametrize(("width", "overlap"), [(8, 0), (8, 8), (1, 1)])
def test_overlaps_that_leave_no_target_are_refused(width: int, overlap: int) -> None:
    for function in (best_fit, count_rows):
        with pytest.raises(ValueError, match="leave a target"):
            function(np.array([3]), width, overlap)
