"""Rows of pairs: every pair that fits is in exactly one row, whole and in order."""

from __future__ import annotations

import json
import tempfile
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from llmtrain.corpus.corpus import Corpus
from llmtrain.data.datasets.base import EMPTY
from llmtrain.data.datasets.paired_rows import PairedRows
from llmtrain.errors import DataError
from tests.support.corpora import EOS, Documents, random_documents, write_corpus, write_manifest


def write_pairs(path: Path, documents: Documents, documents_per_sample: int = 6) -> Corpus:
    write_corpus(path, {"train": documents}, documents_per_sample=documents_per_sample)
    manifest = json.loads((path / "manifest.json").read_text())
    write_manifest(path, {**manifest, "paired": True})
    return Corpus.open(path)


def pairs_of(raw: dict[str, np.ndarray], row: int) -> list[tuple[list[int], list[int]]]:
    """The pairs of a row, which stand one behind the other, with their ends."""
    sides = []
    for tokens, documents in (("sources", "source_documents"), ("targets", "documents")):
        ids, numbers = raw[tokens][row], raw[documents][row]
        filled = int((numbers >= 0).sum())
        assert (numbers[:filled] >= 0).all()
        assert not ids[filled:].any()
        assert (np.diff(numbers[:filled]) >= 0).all()
        count = int(numbers.max(initial=-1)) + 1
        sides.append([ids[numbers == number].tolist() for number in range(count)])
    return list(zip(*sides, strict=True))


@settings(deadline=None, max_examples=40)
@given(
    num_pairs=st.integers(1, 40),
    longest=st.integers(2, 20),
    widths=st.tuples(st.integers(4, 30), st.integers(4, 30)),
    seed=st.integers(0, 1000),
)
def test_every_pair_that_fits_is_in_one_row(
    num_pairs: int, longest: int, widths: tuple[int, int], seed: int
) -> None:
    documents = random_documents(2 * num_pairs, seed, longest=longest)
    wanted = [
        (source, target)
        for i in range(0, 2 * num_pairs, 2)
        for source, target in [([*documents[i], EOS], [*documents[i + 1], EOS])]
        if len(source) <= widths[0] and len(target) <= widths[1]
    ]
    with tempfile.TemporaryDirectory() as folder:
        split = write_pairs(Path(folder) / "corpus", documents).split("train")
        if not wanted:
            with pytest.raises(DataError, match="no pair of up to"):
                PairedRows(split, *widths)
            return
        rows = PairedRows(split, *widths, cache=Path(folder))
        again = PairedRows(split, *widths, cache=Path(folder))
        assert again.tar_sizes.tolist() == rows.tar_sizes.tolist()
        raw = rows.get(np.arange(len(rows)))
        assert raw["sources"].shape == (len(rows), widths[0])
        assert raw["documents"].shape == (len(rows), widths[1])
        found = [pairs_of(raw, row) for row in range(len(rows))]
        assert all(found)
        assert [pair for row in found for pair in row] == wanted
        # Next fit: what begins a row of the same tar file had no room in the row before.
        tars = np.repeat(np.arange(len(rows.tar_sizes)), rows.tar_sizes)
        for before, after in zip(range(len(found) - 1), range(1, len(found)), strict=True):
            if tars[before] == tars[after]:
                both = [*found[before], found[after][0]]
                assert any(sum(len(pair[side]) for pair in both) > widths[side] for side in (0, 1))
        # Rows are the same in any order and micro-batch, and EMPTY ones hold nothing.
        order = np.array([len(rows) - 1, EMPTY, 0])
        some = rows.get(order)
        for i, index in enumerate(order.tolist()):
            assert pairs_of(some, i) == ([] if index == EMPTY else found[index])
            if index != EMPTY:
                lengths = [len(side) for pair in found[index] for side in pair]
                assert [tokens for _, _, tokens in rows.where(index)] == lengths


def test_longer_pairs_are_counted(tmp_path: Path) -> None:
    documents = [[5] * 3, [6] * 3, [7] * 30, [8] * 2, [9] * 2, [4] * 2]
    rows = PairedRows(write_pairs(tmp_path, documents).split("train"), 8, 8)
    assert rows.describe() == (
        "train: 14 tokens of 2 pairs in 1 rows of 8 and 8, 12.5 % padding; 1 longer pairs left out"
    )
    assert [document for _, document, _ in rows.where(0)] == [0, 1, 4, 5]


def test_parted_pairs_are_refused(tmp_path: Path) -> None:
    split = write_pairs(tmp_path, random_documents(40), documents_per_sample=5).split("train")
    with pytest.raises(DataError, match="two for each pair"):
        PairedRows(split, 50, 50)
