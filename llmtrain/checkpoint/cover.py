"""Check that boxes cover a matrix exactly once. Free of torch."""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Sequence

from llmtrain.tensor_boxes import Box


def cover_problem(whole: Box, boxes: Sequence[Box]) -> str | None:
    """Return the first reason why `boxes` do not cover `whole` exactly once, or None.

    A sweep line moves down the rows and keeps a sorted list of the columns of the boxes that it crosses,
    so that each box is compared only with its two neighbors.
    """
    for box in boxes:
        if box.numel <= 0 or whole.intersection(box) != box:
            return f"the box {tuple(box)} is not within {tuple(whole)}"
    ends = [(box.row + box.rows, False, box) for box in boxes]
    starts = [(box.row, True, box) for box in boxes]
    met: list[tuple[int, int]] = []  # (first column, last column + 1)
    for row, is_start, box in sorted([*ends, *starts]):
        columns = box.column, box.column + box.columns
        at = bisect_left(met, columns)
        if not is_start:
            del met[at]
            continue
        after_left = at == 0 or met[at - 1][1] <= columns[0]
        before_right = at == len(met) or columns[1] <= met[at][0]
        if not (after_left and before_right):
            return f"elements of row {row} are in two boxes"
        met.insert(at, columns)
    missing = whole.numel - sum(box.numel for box in boxes)
    return f"{missing:,} of {whole.numel:,} elements are in no box" if missing else None
