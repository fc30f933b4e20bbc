"""Words of texts: counted in bounded memory, encoded once, joined to phrases; co-occurrences against brute
force."""

from __future__ import annotations

import itertools
import json
from collections import Counter
from pathlib import Path

import numpy as np
import pytest

from llmtrain.errors import DataError
from llmtrain.vectors import glove, phrases, text
from llmtrain.vectors.config import GloveConfig, TextsConfig, Word2VecConfig
from llmtrain.vectors.pair_counts import PairCounts
from llmtrain.vectors.registry import build_trainer
from llmtrain.vectors.text import Text, open_text
from llmtrain.vectors.trainer import Setting
from llmtrain.vectors.vocabulary import WordCounts


def documents_of(found: Text) -> list[list[str]]:
    ends = np.flatnonzero(found.tokens == -1)
    return [
        [found.words[i] for i in part if i >= 0] for part in np.split(np.array(found.tokens), ends + 1)[:-1]
    ]


def test_words_are_counted_and_encoded_and_kept_for_the_next_start(tmp_path: Path) -> None:
    rows = ["Don't stop, don't!", "Don't 42 stop_now", "rare"]
    (tmp_path / "a.jsonl").write_text("".join(json.dumps({"body": row}) + "\n" for row in rows))
    data = TextsConfig(path=(str(tmp_path / "a.jsonl"),), text_field="body")
    said: list[str] = []
    found = open_text(data, Word2VecConfig(min_count=2), tmp_path / "words", said.append)
    assert (found.words, found.counts.tolist()) == (["don't", "stop"], [3, 2])
    assert documents_of(found) == [["don't", "stop", "don't"], ["don't", "stop"], []]
    assert "6 words" not in said[0]
    before = len(said)
    again = open_text(data, Word2VecConfig(min_count=2), tmp_path / "words", said.append)
    assert (again.fingerprint, len(said)) == (found.fingerprint, before)
    assert open_text(data, Word2VecConfig(min_count=1), tmp_path / "words", said.append).num_words == 8
    # A damaged file is made anew.
    (tmp_path / "words" / "text.i32").write_bytes(bytes(4))
    assert (
        open_text(data, Word2VecConfig(min_count=2), tmp_path / "words", said.append).fingerprint
        == found.fingerprint
    )


def test_a_pattern_and_case_are_the_users(tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_text("One two, ONE.")
    data = TextsConfig(path=(str(tmp_path),), lower=False, pattern=r"\w+|[.,]")
    assert set(open_text(data, Word2VecConfig(min_count=1), tmp_path / "w", print).words) == {
        "One",
        "two",
        ",",
        "ONE",
        ".",
    }


def test_the_words_of_a_corpus_are_those_of_its_documents(corpus: Path, tmp_path: Path) -> None:
    from llmtrain.corpus.config import TokenDataConfig
    from llmtrain.corpus.corpora import open_corpora

    found = open_text(TextsConfig(path=(str(corpus),)), Word2VecConfig(min_count=1), tmp_path / "w", print)
    corpora = open_corpora(TokenDataConfig(path=str(corpus)))
    (split,) = corpora.splits("train").values()
    tokens, ends = split.read(0, split.num_tokens)
    tokenizer = corpora.load_tokenizer()
    ids = tokens[: ends[0] - 1].tolist()
    corpora.close()
    first = text.words_of(
        tokenizer.decode(ids), __import__("re").compile(TextsConfig(path=("x",)).pattern), True
    )
    documents = documents_of(found)
    assert len(documents) == split.num_documents
    assert documents[0] == first


def test_rare_words_are_forgotten_first_when_there_are_too_many() -> None:
    counts = WordCounts(1000)
    counts.add(["often"] * 50)
    for start in range(0, 5000, 100):
        counts.add([f"w{i}" for i in range(start, start + 100)])
        counts.add(["often", "second"])
    assert len(counts.counts) <= 1000
    assert counts.forgotten_up_to >= 1
    words, found = counts.vocabulary(20, None)
    assert words[0] == "often"
    assert found[0] == 100


@pytest.mark.parametrize(
    ("content", "keys", "told"),
    [
        (
            "one two",
            {"min_count": 3},
            r"model.min_count: got 3, which leaves none of 2 words; allowed: 1 to 1",
        ),
        ("... !!!", {"min_count": 1}, r"data.path: got no word in"),
    ],
)
def test_a_vocabulary_without_a_word_is_told(
    content: str, keys: dict[str, int], told: str, tmp_path: Path
) -> None:
    (tmp_path / "a.txt").write_text(content)
    with pytest.raises(DataError, match=told):
        open_text(TextsConfig(path=(str(tmp_path / "a.txt"),)), Word2VecConfig(**keys), tmp_path / "w", print)


def test_phrases_are_those_of_a_plain_program(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(phrases, "PIECE", 17)  # borders of pieces fall anywhere
    drawn = np.random.default_rng(0)
    documents = []
    for _ in range(200):
        words = drawn.choice(["a", "b", "c", "d"], 8).tolist()
        words[2:2] = ["new", "york"]
        documents.append(
            [*words, *(["new", "york", "times"] if drawn.random() < 0.5 else ["new", "new", "york"])]
        )
    (tmp_path / "a.txt").write_text("\n".join(" ".join(words) for words in documents))
    data = TextsConfig(path=(str(tmp_path / "a.txt"),), txt_document="line")
    config = Word2VecConfig(min_count=3, phrases=2, phrase_threshold=4.5)
    found = open_text(data, config, tmp_path / "w", print)
    expected = documents
    for _ in range(2):
        expected = plain_phrases(expected, 3, 4.5)
    assert documents_of(found) == expected
    counts = Counter(word for words in expected for word in words)
    assert dict(zip(found.words, found.counts.tolist(), strict=True)) == counts
    assert {"new_york", "new_york_times"} <= set(counts)


def plain_phrases(documents: list[list[str]], min_count: int, threshold: float) -> list[list[str]]:
    counts = Counter(word for words in documents for word in words)
    pairs = Counter(pair for words in documents for pair in itertools.pairwise(words))
    total = sum(counts.values())
    chosen = {
        (a, b)
        for (a, b), n in pairs.items()
        if n >= min_count and (n - min_count) * total / (counts[a] * counts[b]) > threshold
    }
    joined = []
    for words in documents:
        out, at = [], 0
        while at < len(words):
            if tuple(words[at : at + 2]) in chosen:
                out.append("_".join(words[at : at + 2]))
                at += 2
            else:
                out.append(words[at])
                at += 1
        joined.append(out)
    counts = Counter(word for words in joined for word in words)
    return [[word for word in words if counts[word] >= min_count] for words in joined]


def made_text(tmp_path: Path, length: int = 400, words: int = 12) -> Text:
    tokens = np.random.default_rng(2).integers(0, words, length).astype(np.int32)
    tokens[np.random.default_rng(3).integers(0, length, 25)] = -1
    counts = np.bincount(tokens[tokens >= 0], minlength=words)
    return Text([f"w{i}" for i in range(words)], counts, tokens, "f", tmp_path)


@pytest.mark.parametrize("symmetric", [True, False])
@pytest.mark.parametrize("most", [1 << 10, 1 << 25])
def test_co_occurrences_equal_brute_force(
    symmetric: bool, most: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(glove, "PIECE_TOKENS", 37)
    given = made_text(tmp_path, 3000, 60)
    config = GloveConfig(window=4, symmetric=symmetric, memory_pairs=most)
    path = glove.count_pairs(given, config, tmp_path, 0)
    expected: Counter[tuple[int, int]] = Counter()
    tokens = given.tokens.tolist()
    for at, word in enumerate(tokens):
        for apart in range(1, 5):
            if at - apart < 0 or -1 in tokens[at - apart : at + 1]:
                break
            expected[word, tokens[at - apart]] += 1 / apart  # type: ignore[assignment]
            if symmetric:
                expected[tokens[at - apart], word] += 1 / apart  # type: ignore[assignment]
    records = np.fromfile(path, glove.RECORD)
    found = {(int(a), int(b)): float(x) for a, b, x in records}
    assert len(found) == len(records) == len(expected)
    assert all(found[pair] == pytest.approx(x) for pair, x in expected.items())
    assert not (np.diff(records["word"].astype(int)) >= 0).all(), "they are shuffled"
    assert sorted(p.name for p in tmp_path.glob("*.pairs")) == []
    stamp = path.stat().st_mtime_ns
    assert glove.count_pairs(given, config, tmp_path, 0).stat().st_mtime_ns == stamp


def test_sums_over_pairs_stay_in_memory(tmp_path: Path) -> None:
    counts = PairCounts(1000, tmp_path, 2000)
    drawn = np.random.default_rng(0)
    expected: Counter[int] = Counter()
    for _ in range(30):
        a, b = drawn.integers(0, 1000, 500), drawn.integers(0, 50, 500)
        counts.add(a, b, 0.5)
        expected.update((a * 1000 + b).tolist())
    pieces = list(counts.ranges())
    assert len(pieces) > 3
    keys = np.concatenate([a.astype(int) * 1000 + b for a, b, _ in pieces])
    assert (np.diff(keys) > 0).all()
    values = np.concatenate([value for *_, value in pieces])
    assert dict(zip(keys.tolist(), (values * 2).tolist(), strict=True)) == expected


def test_glove_moves_by_its_gradient_and_the_loss_falls(tmp_path: Path) -> None:
    import torch

    given = made_text(tmp_path, 200, 8)
    setting = Setting(given, tmp_path, 1, 10_000, 0.05, 0.0, lambda _: None)
    made = build_trainer(GloveConfig(dimensions=5, window=3, x_max=10), setting)
    before = {name: torch.tensor(np.array(rows)) for name, rows in made.weights().items()}
    squares = {name: torch.ones_like(rows) for name, rows in before.items()}
    records = np.fromfile(tmp_path / glove.PAIRS, glove.RECORD)
    total = 0.0
    for word, other, count in records.tolist():
        leaf = {name: rows.clone().requires_grad_(True) for name, rows in before.items()}
        apart = (
            leaf["words"][word] @ leaf["contexts"][other]
            + leaf["word_biases"][0, word]
            + leaf["context_biases"][0, other]
            - np.log(count)
        )
        loss = 0.5 * min(1.0, (count / 10) ** 0.75) * apart**2
        loss.backward()
        total += float(loss.detach())
        for name, rows in leaf.items():
            assert rows.grad is not None
            before[name] -= 0.05 * rows.grad / squares[name].sqrt()
            squares[name] += rows.grad**2
    trained = made.step(0, 20, 1)
    assert trained.loss == pytest.approx(total / len(records), rel=1e-4)
    for name, rows in made.weights().items():
        np.testing.assert_allclose(rows, before[name].numpy(), atol=1e-5, err_msg=name)
        np.testing.assert_allclose(made.optimizer_state()["square"][name], squares[name].numpy(), rtol=1e-4)
    later = [made.step(number, 20, 1).loss for number in range(1, 20)]
    assert later[-1] is not None
    assert later[-1] < 0.5 * total / len(records)
