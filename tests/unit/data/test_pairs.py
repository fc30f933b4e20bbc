"""Passages cover each document once, and come with one of another document."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from llmtrain.corpus.corpus import Corpus
from llmtrain.corpus.token_split import TokenSplit
from llmtrain.data.datasets.base import EMPTY, ReadsTars
from llmtrain.data.datasets.pairs import Passages
from llmtrain.data.mixture import begin
from llmtrain.data.stream import Stream
from llmtrain.errors import DataError
from tests.support.corpora import random_documents, write_corpus

TRAIN = [[7], [8, 9], *random_documents(30, seed=3)]
T = 20


@pytest.fixture(scope="module")
def split(tmp_path_factory: pytest.TempPathFactory) -> TokenSplit:
    folder = tmp_path_factory.mktemp("corpora") / "corpus"
    splits = {"train": TRAIN, "validation": TRAIN[:3], "test": [[5]]}
    return Corpus.open(write_corpus(folder, splits)).split("train")


def texts(raw: dict[str, np.ndarray], which: str, length: str) -> list[list[int]]:
    return [row[:n].tolist() for row, n in zip(raw[which], raw[length], strict=True)]


def test_passages_cover_each_document_once(split: TokenSplit) -> None:
    dataset = Passages(split, T)
    raw = dataset.get(np.arange(len(dataset)))
    found = texts(raw, "passages", "passage_lengths")
    together = [token for passage in found for token in passage]
    assert together == [token for document in TRAIN if len(document) > 1 for token in document]
    assert all(2 <= len(passage) <= T - 3 for passage in found)
    assert all(row[n:].any() == 0 for row, n in zip(raw["passages"], raw["passage_lengths"], strict=True))
    assert dataset.tokens_per_sample == pytest.approx(len(together) / len(dataset))
    assert dataset.tar_sizes.sum() == len(dataset)
    assert isinstance(dataset, ReadsTars)


def test_others_are_passages_of_other_documents_of_the_tar(split: TokenSplit) -> None:
    dataset = Passages(split, T)
    raw = dataset.get(np.arange(len(dataset)))
    passages, others = texts(raw, "passages", "passage_lengths"), texts(raw, "others", "other_lengths")
    tar_of = np.repeat(np.arange(len(dataset.tar_sizes)), dataset.tar_sizes)

    def document_of(passage: list[int]) -> int:
        holders = [
            number
            for number, document in enumerate(TRAIN)
            if any(document[i : i + len(passage)] == passage for i in range(len(document)))
        ]
        return holders[0]

    for i, (passage, other) in enumerate(zip(passages, others, strict=True)):
        assert other in [passages[j] for j in np.flatnonzero(tar_of == tar_of[i])]
        assert document_of(passage) != document_of(other)
    assert len({tuple(other) for other in others}) > len(others) // 3


def test_any_order_and_empty_samples(split: TokenSplit) -> None:
    dataset = Passages(split, T)
    whole = dataset.get(np.arange(len(dataset)))
    order = np.append(np.random.default_rng(0).permutation(len(dataset)), EMPTY)
    raw = dataset.get(order)
    for key, values in raw.items():
        np.testing.assert_array_equal(values[:-1], whole[key][order[:-1]])
        assert not values[-1].any()
    assert not any(values.any() for values in dataset.get(np.array([EMPTY, EMPTY])).values())


def test_refusals(split: TokenSplit, tmp_path: Path) -> None:
    with pytest.raises(DataError, match="16 or more"):
        Passages(split, 15)
    lonely = Corpus.open(write_corpus(tmp_path / "corpus", {"train": [[5], [6]]})).split("train")
    with pytest.raises(DataError, match="no document of 2 tokens"):
        Passages(lonely, T)


def test_a_tar_of_one_document_has_no_others(tmp_path: Path) -> None:
    documents = [list(range(5, 45))]
    alone = Corpus.open(write_corpus(tmp_path / "corpus", {"train": documents})).split("train")
    raw = Passages(alone, T).get(np.arange(3))
    assert not raw["other_lengths"].any()
    assert raw["passage_lengths"].tolist() == [13, 13, 14]


def test_keys_belong_to_samples_and_epochs(split: TokenSplit) -> None:
    """Whatever slice of a step is asked for; and another in each epoch."""
    dataset = Passages(split, T)
    n = len(dataset)
    stream = Stream({"": dataset}, begin(n, {"": 1.0}, {}), seed=5, shuffle_tars=2)
    keys = [stream.keys(stream.origins(range(e * n, e * n + n), e)) for e in (0, 1)]
    orders = [stream.origins(range(e * n, e * n + n), e).indices for e in (0, 1)]
    by_sample = [key[np.argsort(order)] for key, order in zip(keys, orders, strict=True)]
    assert len(set(by_sample[0]) | set(by_sample[1])) == 2 * n
    assert min(key.min() for key in keys) >= 0
    part = stream.keys(stream.origins(range(3, 9), 0))
    np.testing.assert_array_equal(part, keys[0][3:9])
    other = Stream({"b": dataset}, begin(n, {"b": 1.0}, {}), seed=5, shuffle_tars=2)
    assert not set(other.keys(other.origins(range(n), 0))) & set(keys[0])
