"""Files of vectors: written and read by us and by gensim, damaged ones, and pickles that hold more."""

from __future__ import annotations

import os
import pickle
import re
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from llmtrain.errors import DataError
from llmtrain.vectors import pickled
from llmtrain.vectors.files_in import read_file
from llmtrain.vectors.files_out import write_file
from llmtrain.vectors.keyed import WordVectors
from llmtrain.vectors.ngrams import grams_of

WORDS = ["the", "größe", "new_york", "don't", "x"]


@pytest.fixture
def vectors() -> WordVectors:
    matrix = np.random.default_rng(0).normal(size=(5, 7)).astype(np.float32)
    matrix[0, :3] = [0, -1e-30, 3e38]
    return WordVectors(WORDS, matrix, np.array([9, 7, 5, 3, 1]))


@pytest.fixture(scope="module")
def fasttext() -> Any:
    from gensim.models import FastText

    texts = [["good", "film", "größe"], ["bad", "film"], ["good", "bad", "tale"]] * 5
    return FastText(texts, vector_size=10, min_count=1, bucket=60, epochs=1, min_n=2, max_n=4, sg=1)


def equal(a: Any, b: WordVectors) -> None:
    assert list(a.index_to_key) == list(b.words)
    assert (a.vectors == b.matrix).all()


@pytest.mark.parametrize("form", ["text", "binary", "gensim"])
def test_each_form_is_read_by_gensim_and_by_us_with_equal_vectors(
    form: Any, vectors: WordVectors, tmp_path: Path
) -> None:
    from gensim.models import KeyedVectors

    path = tmp_path / "vectors"
    write_file(vectors, path, form)
    if form == "gensim":
        theirs = KeyedVectors.load(str(path))
        assert theirs.get_vecattr("größe", "count") == 7
        assert theirs.most_similar("x", topn=1)
    else:
        theirs = KeyedVectors.load_word2vec_format(str(path), binary=form == "binary")
    equal(theirs, vectors)
    for named in ("auto", form):
        ours = read_file(path, named)
        assert list(ours.words) == WORDS
        assert (ours.matrix == vectors.matrix).all()


@pytest.mark.parametrize("separately", [False, True])
def test_what_gensim_saved_is_read(separately: bool, tmp_path: Path) -> None:
    from gensim.models import Word2Vec

    model = Word2Vec([["a", "b", "c"], ["b", "c"]] * 3, vector_size=6, min_count=1)
    keys: dict[str, Any] = {"sep_limit": 0} if separately else {}
    model.wv.save(str(tmp_path / "kv"), **keys)
    assert (tmp_path / "kv.vectors.npy").exists() == separately
    ours = read_file(tmp_path / "kv")
    equal(model.wv, ours)
    assert ours.counts is not None
    assert ours.counts.tolist() == [model.wv.get_vecattr(word, "count") for word in ours.words]
    model.save(str(tmp_path / "model"))
    equal(model.wv, read_file(tmp_path / "model"))
    for binary in (False, True):
        model.wv.save_word2vec_format(str(tmp_path / "w2v"), binary=binary)
        np.testing.assert_allclose(read_file(tmp_path / "w2v").matrix, model.wv.vectors, atol=1e-7)


def test_a_bin_of_fasttext_gives_gensims_vectors_of_seen_and_unseen_words(
    fasttext: Any, tmp_path: Path
) -> None:
    from gensim.models.fasttext import save_facebook_model

    save_facebook_model(fasttext, str(tmp_path / "model.bin"))
    ours = read_file(tmp_path / "model.bin")
    assert sorted(ours.words) == sorted(fasttext.wv.index_to_key)
    for word in (*ours.words, "goodness", "größer", "zzz"):
        np.testing.assert_allclose(ours.vector(word), fasttext.wv[word], atol=1e-6, err_msg=word)
    content = (tmp_path / "model.bin").read_bytes()
    for cut in (3, 40, 90, 200, len(content) // 2, len(content) - 50):
        (tmp_path / "cut.bin").write_bytes(content[:cut])
        with pytest.raises(DataError) as told:
            read_file(tmp_path / "cut.bin", "fasttext")
        assert len(told.value.problems) == 1
    (tmp_path / "old.bin").write_bytes(content[:4] + b"\x0b" + content[5:])
    with pytest.raises(DataError, match="fastText's version 11, not 12"):
        read_file(tmp_path / "old.bin")


def test_the_vec_form_and_gloves_text_are_read(tmp_path: Path) -> None:
    (tmp_path / "a.vec").write_text("2 3\nthe 0.1 0.2 0.3 \nof -1 2 3e-1 \n")
    assert (
        read_file(tmp_path / "a.vec").matrix.tolist() == np.float32([[0.1, 0.2, 0.3], [-1, 2, 0.3]]).tolist()
    )
    (tmp_path / "glove.txt").write_text("the 0.1 0.2 0.3\nof -1 2 3\n")
    assert list(read_file(tmp_path / "glove.txt").words) == ["the", "of"]


@pytest.mark.parametrize(
    ("form", "change", "told"),
    [
        ("binary", lambda b: b[:-5], "cut short"),
        ("binary", lambda b: b[: len(b) // 2], "cut short, or of another dimension"),
        ("binary", lambda b: b.replace(b"5 7\n", b"5 6\n"), "another dimension"),
        ("binary", lambda b: b.replace(b"5 7\n", b"5 8\n"), "another dimension"),
        ("binary", lambda b: b.replace(b"5 7\n", b"5 700\n"), "another dimension"),
        ("binary", lambda b: b.replace(b"5 7\n", b"999999999 7\n"), "another dimension"),
        ("binary", lambda b: b.replace(b"5 7\n", b"hello\n"), "no first line with the number of words"),
        ("text", lambda b: b[: b.rindex(b"x")], "4 words in place of 5"),
        ("text", lambda b: b.replace(b"x ", b"the "), "the word 'the' twice"),
        ("text", lambda b: b.rsplit(b" ", 1)[0], "line 6: 6 numbers in place of 7"),
        ("text", lambda b: b[:-9] + b" good\n", "line 6: no word and numbers"),
        ("text", lambda b: b"", "0 words"),
        ("gensim", lambda b: b[: len(b) // 2], "pickle"),
        ("gensim", lambda b: b"\x80\x03]q\x00.", "no KeyedVectors of gensim 4"),
    ],
)
def test_a_damaged_file_is_told_in_one_line(
    form: Any, change: Any, told: str, vectors: WordVectors, tmp_path: Path
) -> None:
    path = tmp_path / "vectors"
    write_file(vectors, path, form)
    path.write_bytes(change(path.read_bytes()))
    with pytest.raises(DataError, match=re.escape(told)) as error:
        read_file(path, form)
    assert len(error.value.problems) == 1
    assert str(path) in str(error.value)


class _Runs:
    def __init__(self, path: Path) -> None:
        self._path = path

    def __reduce__(self) -> Any:
        return os.mkdir, (str(self._path),)


@pytest.mark.parametrize("protocol", range(6))
def test_a_pickle_is_not_run(protocol: int, tmp_path: Path) -> None:
    bad = tmp_path / "bad"
    bad.write_bytes(pickle.dumps({"vectors": _Runs(tmp_path / "made")}, protocol))
    with pytest.raises(DataError, match=r"no KeyedVectors of gensim 4|the instruction DICT"):
        read_file(bad, "gensim")
    assert not (tmp_path / "made").exists()


@pytest.mark.parametrize("protocol", [2, 3, 4])
def test_plain_values_of_a_pickle_are_read(protocol: int) -> None:
    value = {
        "a": [1, -2, 2**40, 1.5, None, True, False],
        "b": ("x", b"bytes"),
        "c": np.arange(6.0).reshape(2, 3),
    }
    found = pickled.read(pickle.dumps(value, protocol))
    assert found["a"] == value["a"]
    assert found["b"] == value["b"]
    assert (found["c"] == value["c"]).all()


def test_a_word_with_a_space_is_refused_in_forms_that_end_words_by_one(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="'new york' in word2vec's text form"):
        write_file(WordVectors(["new york"], np.ones((1, 2), np.float32)), tmp_path / "x", "text")


def test_the_grams_are_those_of_fasttext() -> None:
    from gensim.models.fasttext_inner import compute_ngrams_bytes, ft_hash_bytes

    from llmtrain.vectors.ngrams import hash_of

    for word in ("good", "größe", "a", "日本語"):
        theirs = [bytes(gram) for gram in compute_ngrams_bytes(word, 2, 5)]
        ours = [gram.encode() for gram in grams_of(word, 2, 5)]
        assert sorted(ours) == sorted(theirs)
        assert [hash_of(gram) for gram in ours] == [ft_hash_bytes(gram) for gram in ours]
