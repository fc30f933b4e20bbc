"""Filter documents by language and by quality rules for web text.

The rules are those of Rae et al. 2021 (Gopher, arXiv:2112.11446): section A.1.1 for quality, table A1 for
repetition. Words are separated by white space, lengths are in characters. Occurrences of an n-gram after the
first count as duplicate; overlapping characters count once.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Callable, Sequence
from functools import lru_cache
from itertools import compress
from typing import Any

import numpy as np

from llmtrain.errors import ConfigError, Problem, nearest
from llmtrain.prepare.clean import SEPARATOR
from llmtrain.prepare.config import FiltersConfig

LANGUAGE_CHARACTERS = 500
"""The language is detected from this many characters at the beginning of a document."""

WORDS = (50, 100_000)
MEAN_WORD_LENGTH = (3.0, 10.0)
MOST_SYMBOLS_PER_WORD = 0.1
MOST_BULLET_LINES = 0.9
MOST_ELLIPSIS_LINES = 0.3
LEAST_ALPHABETIC_WORDS = 0.8
STOP_WORDS = frozenset(["the", "be", "to", "of", "and", "that", "have", "with"])
LEAST_STOP_WORDS = 2
MOST_DUPLICATE_LINES, MOST_DUPLICATE_LINE_CHARACTERS = 0.30, 0.20
MOST_DUPLICATE_PARAGRAPHS, MOST_DUPLICATE_PARAGRAPH_CHARACTERS = 0.30, 0.20
MOST_TOP_NGRAM_CHARACTERS = {2: 0.20, 3: 0.18, 4: 0.16}
MOST_DUPLICATE_NGRAM_CHARACTERS = {5: 0.15, 6: 0.14, 7: 0.13, 8: 0.12, 9: 0.11, 10: 0.10}

_BULLETS = ("•", "‣", "▶", "◦", "●", "▪", "■", "-", "*")
_ELLIPSES = ("...", "…")
_PARAGRAPHS = re.compile(r"\n{2,}")
_LINES = re.compile(r"\n+")


def require(config: FiltersConfig) -> None:
    """Raise ConfigError if the package for languages is not installed, or does not support a language."""
    if not config.languages:
        return
    try:
        known = _identifier().labels
    except ImportError as error:
        where, got = "filters.languages", "languages, but the package py3langid is not installed"
        raise ConfigError(Problem(where, got, "none", 'or pip install "llmtrain[filters]"')) from error
    unknown = [language for language in config.languages if language not in known]
    if unknown:
        raise ConfigError(
            Problem("filters.languages", language, nearest(language, known), "ISO 639-1 codes")
            for language in unknown
        )


def keep(documents: Sequence[bytes], config: FiltersConfig, dropped: dict[str, int]) -> list[bytes]:
    """Return the documents that pass, in order; add the number dropped by each rule to `dropped`."""
    rule: Callable[[str], str] = lambda text: (  # noqa: E731
        (_wrong_language(text, config) if config.languages else "")
        or (gopher_rule(text) if config.quality else "")
    )
    if not config.languages and config.quality is None:
        return [*documents]
    # A pair is dropped if either text breaks a rule.
    broken = [next(filter(None, map(rule, document.decode().split(SEPARATOR))), "") for document in documents]
    for name, count in Counter(filter(None, broken)).items():
        dropped[name] = dropped.get(name, 0) + count
    return [*compress(documents, [not name for name in broken])]


def _wrong_language(text: str, config: FiltersConfig) -> str:
    language, probability = _identifier().classify(text[:LANGUAGE_CHARACTERS])
    if language not in config.languages:
        return "language"
    return "language_confidence" if probability < config.language_confidence else ""


@lru_cache(maxsize=1)
def _identifier() -> Any:
    from py3langid.langid import MODEL_FILE, LanguageIdentifier

    return LanguageIdentifier.from_model_file(MODEL_FILE, norm_probs=True)


# -------------------------------------------------------------------------------------------- gopher


def gopher_rule(text: str) -> str:
    """Return the name of the first rule that the text breaks, "" if it breaks none."""
    words = text.split()
    return _quality_rule(text, words) or _repetition_rule(text, words)


def _quality_rule(text: str, words: list[str]) -> str:
    count = len(words)
    if not WORDS[0] <= count <= WORDS[1]:
        return "words"
    if not MEAN_WORD_LENGTH[0] <= sum(map(len, words)) / count <= MEAN_WORD_LENGTH[1]:
        return "mean_word_length"
    if text.count("#") > MOST_SYMBOLS_PER_WORD * count:
        return "hashes"
    if sum(map(text.count, _ELLIPSES)) > MOST_SYMBOLS_PER_WORD * count:
        return "ellipses"
    lines = [line.strip() for line in text.splitlines() if not line.isspace() and line]
    if sum(line.startswith(_BULLETS) for line in lines) > MOST_BULLET_LINES * len(lines):
        return "bullet_lines"
    if sum(line.endswith(_ELLIPSES) for line in lines) > MOST_ELLIPSIS_LINES * len(lines):
        return "ellipsis_lines"
    if sum(word.isalpha() or any(map(str.isalpha, word)) for word in words) < LEAST_ALPHABETIC_WORDS * count:
        return "alphabetic_words"
    # Words of the text include adjacent punctuation.
    bare = {word.strip(".,;:!?\"'()[]").lower() for word in set(words)}
    return "stop_words" if len(STOP_WORDS & bare) < LEAST_STOP_WORDS else ""


def _repetition_rule(text: str, words: list[str]) -> str:
    for name, border, most, most_characters in (
        ("paragraphs", _PARAGRAPHS, MOST_DUPLICATE_PARAGRAPHS, MOST_DUPLICATE_PARAGRAPH_CHARACTERS),
        ("lines", _LINES, MOST_DUPLICATE_LINES, MOST_DUPLICATE_LINE_CHARACTERS),
    ):
        pieces = [piece for piece in border.split(text.strip()) if piece]
        again = Counter(pieces)
        duplicates = [(piece, count - 1) for piece, count in again.items() if count > 1]
        if sum(count for _, count in duplicates) > most * len(pieces):
            return f"duplicate_{name}"
        if sum(len(piece) * count for piece, count in duplicates) > most_characters * len(text):
            return f"duplicate_{name}_characters"
    return _ngram_rule(words, len(text))


def _ngram_rule(words: list[str], num_characters: int) -> str:
    numbers: dict[str, int] = {}
    ids = np.fromiter((numbers.setdefault(word, len(numbers)) for word in words), np.int64, len(words))
    lengths = np.fromiter(map(len, words), np.int64, len(words))
    ends = np.append(0, np.cumsum(lengths))
    grams = ids
    for size in range(2, max(MOST_DUPLICATE_NGRAM_CHARACTERS) + 1):
        if len(ids) < size:
            return ""
        # Number the n-grams by the number of their first n - 1 words and the id of their last word.
        pairs = grams[:-1] * (int(ids.max()) + 1) + ids[size - 1 :]
        _, first, grams, counts = np.unique(pairs, return_index=True, return_inverse=True, return_counts=True)
        if counts.max() == 1:
            # If no n-gram repeats, no longer one does.
            return ""
        if size in MOST_TOP_NGRAM_CHARACTERS:
            top = first[counts == counts.max()]
            characters = int((ends[top + size] - ends[top]).max() * counts.max())
            if characters > MOST_TOP_NGRAM_CHARACTERS[size] * num_characters:
                return f"top_{size}_gram"
        if size in MOST_DUPLICATE_NGRAM_CHARACTERS:
            repeats = np.ones(len(grams), bool)
            repeats[first] = False
            covered = np.convolve(repeats, np.ones(size, np.int64)) > 0
            if int(lengths[covered].sum()) > MOST_DUPLICATE_NGRAM_CHARACTERS[size] * num_characters:
                return f"duplicate_{size}_grams"
    return ""
