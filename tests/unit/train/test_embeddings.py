"""Word vectors that an embedding starts from."""

from __future__ import annotations

import csv
import re
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from llmtrain.cli import main as cli
from llmtrain.interchange.trained import load_trained

WORDS = ["the", "film", "was", "a", "fine", "old", "tale", "awful", "great", "never-seen"]
DIMENSIONS = 6


@pytest.fixture(scope="module")
def vectors(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("vectors") / "words.txt"
    matrix = np.random.default_rng(1).normal(size=(len(WORDS), DIMENSIONS))
    lines = [f"{word} {' '.join(f'{x:.4f}' for x in row)}" for word, row in zip(WORDS, matrix, strict=True)]
    path.write_text("\n".join([f"{len(WORDS)} {DIMENSIONS}", *lines]) + "\n")
    return path


@pytest.fixture(scope="module")
def reviews(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("reviews") / "reviews.csv"
    draw = np.random.default_rng(0)
    with open(path, "w", newline="") as file:
        writer = csv.writer(file)
        writer.writerow(["text", "label"])
        for number in range(60):
            writer.writerow([f"{' '.join(draw.choice(WORDS[:7], 6))} {WORDS[7 + number % 2]}", number % 2])
    return path


def settings(vectors: Path, reviews: Path, tmp_path: Path, *more: str) -> list[str]:
    words = ["model=gru", "model.num_layers=1", "model.hidden_size=8", f"model.embedding_size={DIMENSIONS}"]
    words += ["objective=classification", f"data.path={reviews}", f"data.cache.dir={tmp_path / 'cache'}"]
    words += ["data.split.validation=0.2", f"run.dir={tmp_path / 'run'}", f"embeddings.path={vectors}"]
    return [*words, "batch.global_size=8", "batch.sequence_length=16", "train.epochs=2", *more]


def embedding(run: Path) -> tuple[list[str], Any]:
    trained = load_trained(run)
    return trained.tokenizer().pieces(), trained.weights["embedding.weight"].numpy()


@pytest.mark.parametrize("freeze", [True, False])
def test_the_embedding_starts_from_the_vectors(
    freeze: bool, vectors: Path, reviews: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    words = settings(vectors, reviews, tmp_path, f"embeddings.freeze={freeze}", "optimizer.lr=1e-2")
    assert cli.run_verb("finetune", words) == 0
    assert "word vectors for 10 of 14 words" in capsys.readouterr().err
    pieces, matrix = embedding(tmp_path / "run")
    assert pieces[4:] == WORDS
    given = np.array([line.split()[1:] for line in vectors.read_text().splitlines()[1:]], np.float32)
    if freeze:
        assert np.array_equal(matrix[4:], given)
    else:
        moved = np.abs(matrix[4:] - given).max(1)
        assert (moved < 0.2).all(), "it starts there"
        assert (moved[:-1] > 1e-3).all(), "and learns"
    # What has no vector starts from the seed.
    assert np.abs(matrix[:4]).max() <= 8**-0.5
    assert cli.run_verb("finetune", [*words, "train.epochs=3"]) == 0, "a resumed run"
    if freeze:
        assert np.array_equal(embedding(tmp_path / "run")[1], matrix)


@pytest.mark.parametrize(
    ("text", "more", "message"),
    [
        (
            None,
            ("model.embedding_size=5",),
            "allowed: 5, the width of the embedding; set model.embedding_size=6",
        ),
        ("2 2\nfilm 0.1 0.2\n", (), "got 1 words in place of 2"),
        ("1 2\nfilm 0.1\n", (), "line 2: 1 numbers in place of 2"),
        ("film good bad\n", (), "line 1: no word and numbers"),
        ("1 2\nfilm 0.1 nan\n", (), "line 2: a number that is not finite"),
        ("1 2\nfilm 0.1 x\n", (), "line 2: no word and numbers"),
        ("", ("embeddings.path=null", "embeddings.freeze=true"), "embeddings.freeze: got"),
        ("", ("embeddings.path=nowhere.txt",), "nowhere.txt: got no such file"),
    ],
)
def test_vectors_that_do_not_fit_are_refused_in_one_line(
    text: str | None,
    more: tuple[str, ...],
    message: str,
    vectors: Path,
    reviews: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    if text:
        vectors = tmp_path / "vectors.txt"
        vectors.write_text(text)
    assert cli.run_verb("finetune", settings(vectors, reviews, tmp_path, *more)) == 2
    said = capsys.readouterr().err.strip()
    assert message in said
    assert len(said.splitlines()) == 1
    assert not (tmp_path / "run").exists()


def test_vectors_of_no_word_of_the_tokenizer(
    vectors: Path, reviews: Path, corpus: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    vectors = tmp_path / "vectors.txt"
    vectors.write_text(f"1 {DIMENSIONS}\nzzyzx {'0.1 ' * DIMENSIONS}\n")
    words = settings(vectors, reviews, tmp_path, f"data.tokenizer={corpus}")
    assert cli.run_verb("finetune", words) == 2
    said = capsys.readouterr().err
    assert re.search(r"which has none of the [0-9,]+ words of the tokenizer", said)
    assert not (tmp_path / "run").exists()
