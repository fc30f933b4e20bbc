"""Tables: splits, labels, the cache, and what is refused."""

from __future__ import annotations

import csv
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from llmtrain.errors import DataError
from llmtrain.objectives.classification import ClassificationConfig
from llmtrain.objectives.regression import RegressionConfig
from llmtrain.objectives.tagging import TaggingConfig
from llmtrain.prepare.config import SplitConfig
from llmtrain.tables.build import MANIFEST
from llmtrain.tables.config import TableCacheConfig, TableDataConfig
from llmtrain.tables.ragged import Ragged
from llmtrain.tables.table import Table, open_table

WORDS = ["the", "film", "was", "a", "fine", "old", "tale", "of", "two", "men", "and", "one", "dog"]


def texts(count: int, seed: int = 0) -> list[str]:
    draw = np.random.default_rng(seed)
    return [" ".join(draw.choice(WORDS, draw.integers(3, 30))) + f" {i}" for i in range(count)]


def write_csv(path: Path, rows: Sequence[tuple[Any, ...]], names: Sequence[str] = ("text", "label")) -> Path:
    with open(path, "w", newline="") as file:
        writer = csv.writer(file)
        writer.writerow(names)
        writer.writerows(rows)
    return path


@pytest.fixture(scope="module")
def tokenizer(corpus: Path) -> Path:
    return corpus


@pytest.fixture
def reviews(tmp_path: Path) -> Path:
    rows = [(text, ("bad", "good")[i % 2]) for i, text in enumerate(texts(300))]
    return write_csv(tmp_path / "reviews.csv", rows)


def config(tmp_path: Path, tokenizer: Path, **keys: Any) -> TableDataConfig:
    cache = TableCacheConfig(tmp_path / "cache")
    return TableDataConfig(**{"tokenizer": tokenizer, "cache": cache, **keys})


def opened(tmp_path: Path, tokenizer: Path, task: Any = None, **keys: Any) -> Table:
    return open_table(config(tmp_path, tokenizer, **keys), task or ClassificationConfig(), None)


def test_rows_are_divided_by_a_hash_of_their_text(reviews: Path, tokenizer: Path, tmp_path: Path) -> None:
    table = opened(tmp_path, tokenizer, path=str(reviews))
    counts = {split: facts["rows"] for split, facts in table.splits.items()}
    assert sum(counts.values()) == 300
    assert 240 < counts["train"] < 295
    assert table.labels == ("bad", "good")
    # Another order of the rows changes no row's split.
    lines = reviews.read_text().splitlines()
    reviews.write_text("\n".join([lines[0], *reversed(lines[1:])]) + "\n")
    again = opened(tmp_path, tokenizer, path=str(reviews))
    assert {split: facts["rows"] for split, facts in again.splits.items()} == counts
    ours, theirs = (sorted(pieces(each, "validation")) for each in (table, again))
    assert ours == theirs


def test_the_rows_of_fewer_to_train_on_are_always_the_same(
    reviews: Path, tokenizer: Path, tmp_path: Path
) -> None:
    whole = pieces(opened(tmp_path, tokenizer, path=str(reviews)), "train")
    few = opened(tmp_path, tokenizer, path=str(reviews), max_train_rows=40)
    more = opened(tmp_path, tokenizer, path=str(reviews), max_train_rows=80)
    assert [few.splits[name]["rows"] for name in ("train", "validation")] == [
        40,
        opened(tmp_path, tokenizer, path=str(reviews)).splits["validation"]["rows"],
    ]
    assert sum(few.splits["train"]["labels"].values()) == 40
    assert [row for row in whole if row in set(pieces(few, "train"))] == pieces(few, "train")
    assert set(pieces(few, "train")) < set(pieces(more, "train"))


def test_rows_of_one_title_stay_together(tokenizer: Path, tmp_path: Path) -> None:
    rows = [(text, ("bad", "good")[i // 20 % 2], f"title {i % 20}") for i, text in enumerate(texts(300))]
    path = write_csv(tmp_path / "rows.csv", rows, ("text", "label", "title"))
    table = opened(tmp_path, tokenizer, path=str(path), split_field="title", split=SplitConfig(0.3, 0.3))
    assert len(table.splits) == 3
    assert all(facts["rows"] % 15 == 0 for facts in table.splits.values()), "15 rows share a title"
    with pytest.raises(DataError, match="no field titel"):
        opened(tmp_path, tokenizer, path=str(path), split_field="titel")


def pieces(table: Table, split: str) -> list[tuple[int, ...]]:
    column = table.split(split).columns["first"]
    assert isinstance(column, Ragged)
    return [tuple(column[i].tolist()) for i in range(len(column))]


def test_tokens_and_labels_are_those_of_the_rows(reviews: Path, tokenizer: Path, tmp_path: Path) -> None:
    table = opened(tmp_path, tokenizer, train=str(reviews), validation=str(reviews))
    rows = list(csv.DictReader(reviews.open()))
    encode = table.load_tokenizer().encode
    assert pieces(table, "validation") == [tuple(encode(row["text"])) for row in rows]
    labels = table.split("validation").array("label")
    assert [table.labels[label] for label in labels] == [row["label"] for row in rows]


def test_the_cache_is_made_once_and_again_when_damaged(
    reviews: Path, tokenizer: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    first = opened(tmp_path, tokenizer, path=str(reviews))
    assert "tokenized 300 rows" in capsys.readouterr().err
    assert opened(tmp_path, tokenizer, path=str(reviews)).fingerprint == first.fingerprint
    labelled = ClassificationConfig(labels=("bad", "good"))
    assert opened(tmp_path, tokenizer, labelled, path=str(reviews)).fingerprint == first.fingerprint
    assert not capsys.readouterr().err
    for name in ("train/first.npy", MANIFEST):
        [file] = (tmp_path / "cache").glob(f"*/{name}")
        content = bytearray(file.read_bytes())
        content[len(content) // 2] ^= 1
        file.write_bytes(content)
        assert opened(tmp_path, tokenizer, path=str(reviews)).fingerprint == first.fingerprint
        assert "tokenized" in capsys.readouterr().err
    reviews.write_text(reviews.read_text().replace("film", "movie"))
    assert opened(tmp_path, tokenizer, path=str(reviews)).fingerprint != first.fingerprint


def test_labels_given_in_another_order_number_the_rows_anew(
    reviews: Path, tokenizer: Path, tmp_path: Path
) -> None:
    plain = opened(tmp_path, tokenizer, path=str(reviews))
    turned = opened(tmp_path, tokenizer, ClassificationConfig(labels=("good", "bad")), path=str(reviews))
    ours, theirs = (table.split("train").array("label") for table in (plain, turned))
    assert (ours == 1 - theirs).all()


def test_several_labels_numbers_and_tags(tokenizer: Path, tmp_path: Path) -> None:
    path = tmp_path / "a.jsonl"
    rows = [
        {"text": "one two", "label": ["x", "y"], "score": 1.5, "words": ["one", "two"], "tags": ["O", "B-X"]},
        {"text": "three", "label": [], "score": 2, "words": ["three"], "tags": ["B-Y"]},
    ]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    many = opened(
        tmp_path, tokenizer, ClassificationConfig(multi_label=True), train=str(path), test=str(path)
    )
    assert many.split("test").array("label").tolist() == [[1.0, 1.0], [0.0, 0.0]]
    keys = {"train": str(path), "test": str(path)}
    score = opened(tmp_path, tokenizer, RegressionConfig(), label_field="score", **keys)
    assert score.split("test").array("label").tolist() == [[1.5], [2.0]]
    tagged = opened(tmp_path, tokenizer, TaggingConfig(), text_field="words", label_field="tags", **keys)
    assert tagged.labels == ("B-X", "B-Y", "O")
    tags, starts = (tagged.split("test").columns[name] for name in ("tags", "word_starts"))
    assert [tags[0].tolist(), tags[1].tolist()] == [[2, 0], [1]]
    tokenizer_ = tagged.load_tokenizer()
    assert starts[0].tolist() == [0, len(tokenizer_.encode("one"))]
    assert tagged.split("test").columns["first"][0].tolist() == tokenizer_.encode("one two")


GOOD = [(text, ("bad", "good")[i % 2]) for i, text in enumerate(texts(60))]


@pytest.mark.parametrize(
    ("rows", "keys", "said"),
    [
        (GOOD, {"text_field": "txt"}, "line 2: got no field txt; allowed: text, label"),
        (GOOD, {"label_field": "lable"}, "line 2: got no field lable; allowed: text, label"),
        ([], {}, "got no row with text"),
        ([(text, "1") for text, _ in GOOD], {}, "got one label only, 1"),
        ([(text, text) for text, _ in GOOD], {}, "text_field and data.label_field swapped"),
        ([*GOOD, ("x", "")], {}, "line 62: got nothing in the field label"),
        (GOOD, {"format": "jsonl"}, "line 1: got invalid JSON"),
    ],
    ids=["text", "label", "empty", "one label", "swapped", "no label", "form"],
)
def test_what_cannot_be_learned_from_is_one_line(
    rows: list[tuple[str, str]], keys: dict[str, Any], said: str, tokenizer: Path, tmp_path: Path
) -> None:
    path = write_csv(tmp_path / "a.csv", rows)
    with pytest.raises(DataError) as caught:
        opened(tmp_path, tokenizer, train=str(path), validation=str(path), **keys)
    assert said in str(caught.value)
    assert "\n" not in str(caught.value)
    assert not list((tmp_path / "cache").glob("[!.]*")), "nothing half-written"


def test_a_label_that_training_lacks_is_named_with_its_row(tokenizer: Path, tmp_path: Path) -> None:
    train, other = (
        write_csv(tmp_path / "train.csv", GOOD),
        write_csv(tmp_path / "other.csv", [("a", "so-so")]),
    )
    with pytest.raises(DataError) as caught:
        opened(tmp_path, tokenizer, train=str(train), validation=str(other))
    assert "other.csv line 2: got the label so-so in the validation split" in str(caught.value)
    with pytest.raises(DataError, match="got the labels good; allowed: bad, so-so"):
        opened(tmp_path, tokenizer, ClassificationConfig(labels=("bad", "so-so")), train=str(train))


@pytest.mark.parametrize(("value", "said"), [("nan", "got nan"), ("much", "got 'much'"), ("inf", "got inf")])
def test_numbers_must_be_finite(value: str, said: str, tokenizer: Path, tmp_path: Path) -> None:
    path = write_csv(tmp_path / "a.csv", [("a", "1"), ("b", value)])
    with pytest.raises(DataError, match=said):
        opened(tmp_path, tokenizer, RegressionConfig(), train=str(path))


def test_as_many_tags_as_words(tokenizer: Path, tmp_path: Path) -> None:
    path = tmp_path / "a.jsonl"
    path.write_text('{"tokens": ["a", "b"], "tags": ["O"]}\n')
    with pytest.raises(DataError, match="got 2 words and 1 tags; allowed: as many tags as words"):
        opened(tmp_path, tokenizer, TaggingConfig(), train=str(path), text_field="tokens", label_field="tags")
