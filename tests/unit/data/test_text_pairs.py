"""Pairs of a table: a sample for each target to train on, what is cut, and rows without a target."""

from __future__ import annotations

import json
from typing import Any

import numpy as np

from llmtrain.data.datasets.base import EMPTY, PADDING_DOCUMENT
from llmtrain.data.datasets.text_pairs import TextPairs
from llmtrain.tables.ragged import Ragged
from llmtrain.tables.table import TableSplit

SOURCES = [[5, 6, 7, 8, 9], [5], [6, 6]]
TARGETS: list[list[list[int]]] = [[[10, 11], [12, 13, 14, 15]], [[16]], [[17], [18, 19], [20]]]
START, END = 3, 2


def pairs(targets: list[list[list[int]]] = TARGETS, **more: Any) -> TextPairs:
    columns = {
        "first": Ragged.of([np.array(source) for source in SOURCES], np.int32),
        "target": Ragged.of([np.concatenate([np.zeros(0), *of_row]) for of_row in targets], np.int32),
        "target_ends": Ragged.of([np.cumsum([len(t) for t in of_row]) for of_row in targets], np.int64),
        "references": Ragged.of_texts([json.dumps([f"{t}" for t in of_row]) for of_row in targets]),
    }
    return TextPairs(TableSplit("train", columns, "x"), 6, 4, (START,), END, **more)


def test_each_target_is_a_sample_to_train_on() -> None:
    dataset = pairs(each_target=True)
    found = [(dataset.source(n).tolist(), dataset.target(n).tolist()) for n in range(len(dataset))]
    cut = [START, 5, 6, 7, 8, END]
    assert found == [
        (cut, [10, 11, END]),
        (cut, [12, 13, 14, END]),
        ([START, 5, END], [16, END]),
        ([START, 6, 6, END], [17, END]),
        ([START, 6, 6, END], [18, 19, END]),
        ([START, 6, 6, END], [20, END]),
    ]
    assert dataset.truncated == (2, 1)
    assert dataset.lengths.tolist() == [len(source) + len(target) for source, target in found]
    assert "6 pairs" in dataset.describe()
    assert "2 sources cut to 6 tokens, 1 targets cut to 4 tokens" in dataset.describe()
    assert dataset.references(4) == ["[17]", "[18, 19]", "[20]"]


def test_each_row_is_a_sample_to_evaluate() -> None:
    dataset = pairs()
    assert [dataset.target(n).tolist() for n in range(len(dataset))] == [[10, 11, END], [16, END], [17, END]]
    assert dataset.fingerprint != pairs(each_target=True).fingerprint


def test_arrays_of_a_batch() -> None:
    raw = pairs().get(np.array([1, EMPTY]))
    assert raw["sources"].tolist() == [[START, 5, END, 0, 0, 0], [0] * 6]
    assert raw["targets"].tolist() == [[16, END, 0, 0], [0] * 4]
    pad = PADDING_DOCUMENT
    assert raw["source_documents"].tolist() == [[0, 0, 0, pad, pad, pad], [pad] * 6]
    assert raw["documents"].tolist() == [[0, 0, pad, pad], [pad] * 4]


def test_rows_without_a_target_have_a_source() -> None:
    dataset = pairs([[], [[16]], []])
    assert [dataset.source(n).tolist() for n in range(3)][2] == [START, 6, 6, END]
    assert [dataset.target(n).tolist() for n in range(3)] == [[END], [16, END], [END]]
    assert len(pairs([[], [[16]], []], each_target=True)) == 1
