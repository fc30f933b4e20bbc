"""Packing: put whole documents into rows of one width with little padding.

Best-fit decreasing (arXiv:2404.10830): take documents from the longest down, and put each into the row that
it leaves the least room in. Documents of equal length, and rows with equal room, are interchangeable and
processed in groups, so that the time depends on the number of distinct lengths, not of documents.

Dim names: N documents, P pieces, R rows, L distinct lengths.
"""

from __future__ import annotations

from bisect import bisect_left, insort
from dataclasses import dataclass

import numpy as np

Group = tuple[int, int, int]
"""Pieces of one length: first row that takes them, number of such rows, and pieces per row."""


@dataclass(frozen=True)
class Rows:
    """The tokens of one tar file in rows of `width` tokens.

    A piece is a document, or a part of one that is longer than a row. The pieces of a row are in the order
    of the tar file; no row holds two pieces of one document.
    """

    first_piece: np.ndarray
    """int64 (R + 1,): row r holds the pieces [first_piece[r], first_piece[r + 1])."""
    starts: np.ndarray
    """int64 (P,): first token of each piece, within the tar file."""
    lengths: np.ndarray
    """int32 (P,)."""
    contexts: np.ndarray
    """int32 (P,): number of first tokens of each piece that are not targets: 1 in a document's first
    piece, since nothing precedes its first token, and in later pieces the tokens shared with the previous
    one."""

    def __len__(self) -> int:
        """Return the number of rows R."""
        return len(self.first_piece) - 1


def best_fit(document_lengths: np.ndarray, width: int, overlap: int = 1) -> Rows:
    """Return rows of at most `width` tokens for the consecutive documents (N,) of a tar file.

    Documents longer than a row are cut into pieces of `width` tokens and a last one with the rest.
    Consecutive pieces share `overlap` tokens, which are targets only in the earlier piece. Every token but a
    document's first is therefore a target exactly once. Documents of one token hold no target and are left
    out. A pure function of its arguments.

    Raise ValueError unless 1 ≤ overlap < width.
    """
    starts, lengths, contexts = _pieces(document_lengths, width, overlap)
    longest_first = np.argsort(-lengths, kind="stable")
    groups, num_rows = _place(lengths, width)
    row = np.empty(len(lengths), dtype=np.int64)
    row[longest_first] = _row_of_each(groups)
    # Read the tar file sequentially within a row.
    order = np.lexsort((starts, row))
    first_piece = np.zeros(num_rows + 1, dtype=np.int64)
    np.cumsum(np.bincount(row, minlength=num_rows), out=first_piece[1:])
    return Rows(first_piece, starts[order], lengths[order], contexts[order])


def count_rows(document_lengths: np.ndarray, width: int, overlap: int = 1) -> tuple[int, int]:
    """Return the number of rows of best_fit and of the tokens in them; same arguments as best_fit."""
    lengths = _pieces(document_lengths, width, overlap)[1]
    return _place(lengths, width)[1], int(lengths.sum(dtype=np.int64))


def _pieces(
    document_lengths: np.ndarray, width: int, overlap: int
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Return starts int64, lengths int32 and contexts int32, each (P,), in the order of the tar file."""
    if not 1 <= overlap < width:
        raise ValueError(
            f"an overlap of {overlap} tokens in rows of {width}: 1 to {width - 1} leave a target"
        )
    lengths_N = np.asarray(document_lengths, dtype=np.int64)
    ends_N = np.cumsum(lengths_N)
    stride = width - overlap
    counts_N = np.where(lengths_N < 2, 0, 1 + np.maximum(0, -((width - lengths_N) // stride)))
    document = np.repeat(np.arange(len(lengths_N)), counts_N)
    number_in_document = np.arange(len(document)) - (np.cumsum(counts_N) - counts_N)[document]
    starts = (ends_N - lengths_N)[document] + number_in_document * stride
    lengths = np.minimum(ends_N[document] - starts, width)
    contexts = np.where(number_in_document == 0, 1, overlap)
    return starts, lengths.astype(np.int32), contexts.astype(np.int32)


def _row_of_each(groups: list[Group]) -> np.ndarray:
    """Return the row of each piece, longest first, int64 (P,)."""
    first, number, each = np.array(groups, dtype=np.int64).reshape(-1, 3).T
    sizes = number * each
    place_in_group = np.arange(sizes.sum()) - np.repeat(np.cumsum(sizes) - sizes, sizes)
    return np.repeat(first, sizes) + place_in_group // np.repeat(each, sizes)


def _place(lengths: np.ndarray, width: int) -> tuple[list[Group], int]:
    """Return all pieces, longest first, and R."""
    counts = np.bincount(lengths)
    different_L = np.flatnonzero(counts)[::-1]
    shortest = int(different_L[-1]) if len(different_L) else 0
    groups: list[Group] = []
    num_rows = 0
    runs: dict[int, list[tuple[int, int]]] = {}
    """Room → runs of rows with that room, (first, number); the most recent is used first."""
    rooms: list[int] = []
    """Keys of `runs`, ascending."""

    def keep(first: int, number: int, room: int) -> None:
        if number == 0 or room < shortest:
            return
        if room in runs:
            runs[room].append((first, number))
        else:
            runs[room] = [(first, number)]
            insort(rooms, room)

    for length, left in zip(different_L.tolist(), counts[different_L].tolist(), strict=True):
        while left:
            place = bisect_left(rooms, length)
            if place < len(rooms):
                room = rooms[place]
                first, number = runs[room].pop()
                if not runs[room]:
                    del runs[room], rooms[place]
            else:
                room, first, number = width, num_rows, -(-left // (width // length))
                num_rows += number
            # A row that took one piece has the least room for the next, so it is filled before another.
            each = room // length
            full = min(number, left // each)
            if full:
                groups.append((first, full, each))
                keep(first, full, room - each * length)
                left -= full * each
            if left and full < number:
                groups.append((first + full, 1, left))
                keep(first + full, 1, room - left * length)
                full, left = full + 1, 0
            keep(first + full, number - full, room)
    return groups, num_rows
