"""Nearest words, similarities and analogies against gensim and scikit-learn; maps against scikit-learn."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest

from llmtrain.corpus.packages import resolve_package_path
from llmtrain.errors import DataError
from llmtrain.vectors import maps
from llmtrain.vectors.keyed import WordVectors
from llmtrain.vectors.questions import (
    judge_analogies,
    judge_similarity,
    ranks,
    read_analogies,
    read_pairs,
    total,
)

PAIRS = resolve_package_path("package:gensim/test/test_data/wordsim353.tsv")
SIMLEX = resolve_package_path("package:gensim/test/test_data/simlex999.txt")
ANALOGIES = resolve_package_path("package:gensim/test/test_data/questions-words.txt")


@pytest.fixture(scope="module")
def both() -> tuple[WordVectors, Any]:
    """Vectors of half of the words of the files, near each other at random, and gensim's of the same."""
    from gensim.models import KeyedVectors

    named = {word for pair in read_pairs(PAIRS) + read_pairs(SIMLEX) for word in pair[:2]}
    named |= {word for rows in read_analogies(ANALOGIES).values() for row in rows for word in row}
    words = sorted({word.lower() for word in named})
    drawn = np.random.default_rng(0)
    words = [word for word in words if drawn.random() < 0.8]
    matrix = (drawn.normal(size=(len(words), 3)) @ drawn.normal(size=(3, 30))).astype(np.float32)
    matrix += drawn.normal(0, 0.1, matrix.shape).astype(np.float32)
    theirs = KeyedVectors(30)
    theirs.add_vectors(words, matrix)
    return WordVectors(words, matrix), theirs


@pytest.mark.parametrize("path", [PAIRS, SIMLEX])
def test_the_rank_correlation_is_gensims(path: Path, both: tuple[WordVectors, Any]) -> None:
    ours, theirs = both
    found = judge_similarity(ours, read_pairs(path), "file")
    pearson, spearman, out_of_vocabulary = theirs.evaluate_word_pairs(str(path), restrict_vocab=10**6)
    assert found.rho == pytest.approx(spearman[0], abs=1e-6)
    assert found.pearson == pytest.approx(pearson[0], abs=1e-6)
    assert len(found.skipped) / (found.used + len(found.skipped)) == pytest.approx(out_of_vocabulary / 100)
    assert found.interval[0] < found.rho < found.interval[1]


def test_the_accuracy_on_analogies_is_gensims(both: tuple[WordVectors, Any]) -> None:
    ours, theirs = both
    analogies = {name: rows[:150] for name, rows in read_analogies(ANALOGIES).items()}
    scores = judge_analogies(ours, analogies, 300_000)
    accuracy, sections = theirs.evaluate_word_analogies(str(ANALOGIES))
    whole = judge_analogies(ours, read_analogies(ANALOGIES), 300_000)
    assert total(whole).accuracy == pytest.approx(accuracy)
    assert total(whole).right > 0
    for section in sections[:-1]:
        if section["section"] in whole:
            assert whole[section["section"]].right == len(section["correct"])
            assert whole[section["section"]].asked == len(section["correct"]) + len(section["incorrect"])
    assert sum(score.asked for score in scores.values()) > 100


def test_nearest_words_and_analogies_of_three_words_are_gensims(both: tuple[WordVectors, Any]) -> None:
    ours, theirs = both
    a, b, c = ours.words[3], ours.words[70], ours.words[200]
    expected = theirs.most_similar(a, topn=7)
    found = ours.nearest(ours.vector(a), 7, [a])
    assert [word for word, _ in found] == [word for word, _ in expected]
    np.testing.assert_allclose([x for _, x in found], [x for _, x in expected], atol=1e-5)
    by_analogy = theirs.most_similar(positive=[b, c], negative=[a], topn=5)
    assert [word for word, _ in ours.analogy(a, b, c, 5)] == [word for word, _ in by_analogy]


def test_a_word_without_a_vector_is_named_with_its_neighbours(both: tuple[WordVectors, Any]) -> None:
    ours = WordVectors(["good", "goods", "film"], np.eye(3, dtype=np.float32), source="here")
    with pytest.raises(
        DataError, match=r"word: got 'goodd', which is not among the 3 words of here; allowed: words such"
    ):
        ours.vector("goodd")
    with pytest.raises(DataError, match="the vocabulary has 'good'"):
        ours.vector("Good")


def test_equal_values_share_their_rank() -> None:
    from scipy.stats import rankdata

    values = np.random.default_rng(0).integers(0, 9, 50)
    assert (ranks(values) == rankdata(values)).all()


@pytest.mark.parametrize(
    ("content", "pairs"),
    [
        (
            "Word 1,Word 2,Human (mean)\ntiger,cat,7.35\ncar,bus,6\n",
            [("tiger", "cat", 7.35), ("car", "bus", 6.0)],
        ),
        ("# note\na b 1\nc d 2\n", [("a", "b", 1.0), ("c", "d", 2.0)]),
        (
            "word1\tword2\tPOS\tSimLex999\told\nx\ty\tA\t1.58\t9\nu\tv\tN\t2\t9\n",
            [("x", "y", 1.58), ("u", "v", 2.0)],
        ),
    ],
)
def test_forms_of_judged_pairs(content: str, pairs: list[tuple[str, str, float]], tmp_path: Path) -> None:
    (tmp_path / "pairs").write_text(content)
    assert read_pairs(tmp_path / "pairs") == pairs


@pytest.mark.parametrize(
    ("content", "told"),
    [
        ("tiger cat seven\nhouse car nine\n", "line 2: got 'house car nine', in which there is no number"),
        ("a\tb\t1\nc\td\n", "line 2"),
        ("", "0 pairs of words"),
        ('{"a": 1}\n', "line 1"),
    ],
)
def test_a_similarity_file_of_another_form_is_told_by_its_line(
    content: str, told: str, tmp_path: Path
) -> None:
    (tmp_path / "pairs").write_text(content)
    with pytest.raises(DataError, match=told):
        read_pairs(tmp_path / "pairs")


def test_analogies_of_another_form_are_told_by_their_line(tmp_path: Path) -> None:
    (tmp_path / "q").write_text(": capitals\nAthens Greece Oslo\n")
    with pytest.raises(DataError, match="line 2: got 3 words: 'Athens Greece Oslo'"):
        read_analogies(tmp_path / "q")


def test_maps_by_principal_components_and_tsne_are_scikit_learns() -> None:
    from sklearn.decomposition import PCA
    from sklearn.manifold import TSNE

    drawn = np.random.default_rng(0)
    matrix = drawn.normal(size=(60, 10)) * np.linspace(2, 0.1, 10) + np.repeat(
        drawn.normal(size=(3, 10)) * 4, 20, axis=0
    )
    ours = maps.principal_components(matrix)
    np.testing.assert_allclose(np.abs(ours), np.abs(PCA(2).fit_transform(matrix)), atol=1e-8)
    at = maps.tsne(matrix, 10)
    shares = maps.joint_probabilities(matrix, 10)
    theirs = TSNE(perplexity=10, method="exact", init="pca", random_state=0).fit(matrix)
    assert maps.divergence(at, shares) < 1.1 * theirs.kl_divergence_ + 0.02
    assert (at == maps.tsne(matrix, 10)).all()
    middle = at.reshape(3, 20, 2).mean(axis=1)
    nearest = ((at[:, None] - middle[None]) ** 2).sum(-1).argmin(1)
    assert (nearest == np.repeat([0, 1, 2], 20)).all()
