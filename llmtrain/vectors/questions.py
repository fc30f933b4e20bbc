"""Figures of word vectors: Spearman's ρ on judged pairs of words, and the accuracy on analogies."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from llmtrain.errors import DataError, Problem
from llmtrain.reading import read_bytes
from llmtrain.vectors.keyed import WordVectors, directions_of

QUESTION_BYTES = 64 << 20
SEPARATORS = ("\t", ",", ";")
RESAMPLES = 2000
"""Bootstrap samples of the interval of ρ."""
BLOCK = 256
"""Analogies that are answered at once."""


class Judged(NamedTuple):
    """Two words, and how similar people find them."""

    first: str
    second: str
    score: float


def read_pairs(path: Path) -> list[Judged]:
    """Return the judged pairs of a file: on each line two words and a number between tabs, commas, semicolons
    or spaces, as of WordSim-353; other columns may follow the words, as of SimLex-999, whose header names the
    one of the score. Lines that begin with # are comments, and the first line may be a header.

    Raise DataError, with the line, for another form."""
    found: list[Judged] = []
    column: int | None = None
    for number, line in _lines(path):
        if line.startswith("#"):
            continue
        cells = _cells(line)
        where = (2 if len(cells) > 2 else None) if column is None else column
        score = _number(cells[where]) if where is not None and where < len(cells) else None
        if score is None and not found and column is None:
            column = _column_of_score(cells)
            if column is not None:
                continue
        if score is None:
            got = f"{line[:60]!r}, in which there is no number behind two words"
            allowed = "two words and a score on each line, as in WordSim-353"
            raise DataError(Problem(f"{path}: line {number:,}", got, allowed, "give another file=…"))
        found.append(Judged(cells[0], cells[1], score))
    if len(found) < 2:
        got = f"{len(found)} pairs of words"
        raise DataError(Problem(str(path), got, "two pairs with a score, or more", "give another file=…"))
    return found


def _cells(line: str) -> list[str]:
    separator = next((each for each in SEPARATORS if each in line), None)
    return [cell.strip() for cell in line.split(separator)]


def _number(cell: str) -> float | None:
    try:
        value = float(cell)
    except ValueError:
        return None
    return value if math.isfinite(value) else None


def _column_of_score(header: Sequence[str]) -> int | None:
    """Return the index of the score column: the first whose name contains a word for a score, else the
    third."""
    if len(header) < 3 or any(_number(cell) is not None for cell in header):
        return None
    names = [name.lower() for name in header]
    told = [
        i for i, name in enumerate(names) if i > 1 and any(w in name for w in ("mean", "score", "simlex999"))
    ]
    return told[0] if told else 2


@dataclass(frozen=True)
class Similarity:
    """How vectors agree with judged pairs."""

    rho: float
    interval: tuple[float, float]
    """Of 95 %, by bootstrap over the pairs."""
    pearson: float
    used: int
    skipped: tuple[tuple[str, str], ...]
    """Pairs of which a word has no vector."""

    def facts(self) -> dict[str, Any]:
        return {
            "spearman": self.rho,
            "spearman_interval": list(self.interval),
            "pearson": self.pearson,
            "pairs": self.used,
            "skipped": len(self.skipped),
            "skipped_pairs": [list(pair) for pair in self.skipped],
        }


def judge_similarity(vectors: WordVectors, pairs: Sequence[Judged], where: str) -> Similarity:
    """Compare cosines with people's scores. A word is looked for as it is written, then in lower case.

    Raise DataError if fewer than two pairs have vectors."""
    cosines: list[float] = []
    scores: list[float] = []
    skipped: list[tuple[str, str]] = []
    for pair in pairs:
        known = [_known(vectors, word) for word in (pair.first, pair.second)]
        if None in known:
            skipped.append((pair.first, pair.second))
            continue
        cosines.append(vectors.similarity(*map(str, known)))
        scores.append(pair.score)
    if len(cosines) < 2:
        got = f"{len(cosines)} of {len(pairs)} pairs with both words among {len(vectors.words):,} vectors"
        raise DataError(Problem(where, got, "two or more", "give vectors of a larger text"))
    ours, theirs = np.array(cosines), np.array(scores)
    drawn = np.random.Generator(np.random.Philox(0))
    sampled = []
    for _ in range(RESAMPLES):
        chosen = drawn.integers(len(ours), size=len(ours))
        value = spearman(ours[chosen], theirs[chosen])
        if math.isfinite(value):
            sampled.append(value)
    low, high = np.quantile(sampled, [0.025, 0.975]).tolist() if sampled else (math.nan, math.nan)
    return Similarity(spearman(ours, theirs), (low, high), _pearson(ours, theirs), len(ours), tuple(skipped))


def _known(vectors: WordVectors, word: str) -> str | None:
    return next((each for each in (word, word.lower()) if each in vectors), None)


def spearman(a: np.ndarray, b: np.ndarray) -> float:
    """Return the rank correlation, with mean ranks of equal values; NaN if all values of one are equal."""
    return _pearson(ranks(a), ranks(b))


def ranks(values: np.ndarray) -> np.ndarray:
    """Return the ranks from 1 on; equal values have the mean of theirs."""
    _, inverse, counts = np.unique(values, return_inverse=True, return_counts=True)
    last: np.ndarray = np.cumsum(counts)
    return np.asarray((last - (counts - 1) / 2)[inverse])


def _pearson(a: np.ndarray, b: np.ndarray) -> float:
    a, b = a - a.mean(), b - b.mean()
    norm = math.sqrt(float(a @ a) * float(b @ b))
    return float(a @ b) / norm if norm else math.nan


Analogies = dict[str, list[tuple[str, str, str, str]]]
"""Section → questions: a is to b as c is to d."""


def read_analogies(path: Path) -> Analogies:
    """Return the questions of a file in the form of questions-words.txt: four words on each line, below lines
    `: SECTION`. Raise DataError, with the line, for another form."""
    found: Analogies = {}
    section = "all"
    for number, line in _lines(path):
        if line.startswith(":"):
            section = line.removeprefix(":").strip() or section
            continue
        words = line.split()
        if len(words) != 4:
            got, allowed = f"{len(words)} words: {line[:60]!r}", "four words, or : and the name of a section"
            raise DataError(Problem(f"{path}: line {number:,}", got, allowed, "give another file=…"))
        found.setdefault(section, []).append((words[0], words[1], words[2], words[3]))
    if not found:
        raise DataError(Problem(str(path), "no analogies", "four words on each line", "give another file=…"))
    return found


class Score(NamedTuple):
    """Right answers of a section."""

    right: int
    asked: int
    skipped: int
    """Questions of which a word has no vector."""

    @property
    def accuracy(self) -> float:
        return self.right / self.asked if self.asked else math.nan


def judge_analogies(vectors: WordVectors, analogies: Analogies, among: int | None) -> dict[str, Score]:
    """Return section → score. The answer is the word nearest to b − a + c among the `among` most frequent
    ones without a, b and c (3CosAdd); case does not matter. A question is asked if all four words are among
    these."""
    count = len(vectors.words) if among is None else min(among, len(vectors.words))
    row_of: dict[str, int] = {}
    lowered = [word.lower() for word in vectors.words[:count]]
    for row, word in enumerate(lowered):
        row_of.setdefault(word, row)
    directions_VD = vectors.directions[:count]
    scores: dict[str, Score] = {}
    for section, questions in analogies.items():
        known = [
            [row_of[word.lower()] for word in question]
            for question in questions
            if all(word.lower() in row_of for word in question)
        ]
        right = 0
        for start in range(0, len(known), BLOCK):
            rows = np.array(known[start : start + BLOCK])
            a, b, c, d = rows.T
            wanted = directions_of(directions_VD[b] - directions_VD[a] + directions_VD[c])
            similarity = wanted @ directions_VD.T
            for given in (a, b, c):
                similarity[np.arange(len(rows)), given] = -np.inf
            found = similarity.argmax(axis=1)
            right += sum(lowered[i] == lowered[j] for i, j in zip(found.tolist(), d.tolist(), strict=True))
        scores[section] = Score(right, len(known), len(questions) - len(known))
    return scores


def total(scores: dict[str, Score]) -> Score:
    """Return the score of all sections together."""
    return Score(*(sum(column) for column in zip(*scores.values(), strict=True)))


def _lines(path: Path) -> Iterator[tuple[int, str]]:
    """Yield (number, text) of the lines that are not empty."""
    try:
        text = read_bytes(path, QUESTION_BYTES).decode("utf-8-sig")
    except (OSError, UnicodeDecodeError) as error:
        got = (error.strerror or str(error)) if isinstance(error, OSError) else "bytes that are not UTF-8"
        raise DataError(Problem(str(path), got, "a text file of words", "check file=…")) from None
    for number, line in enumerate(text.splitlines(), 1):
        if line.strip():
            yield number, line.strip()
