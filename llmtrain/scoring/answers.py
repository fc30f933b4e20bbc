"""Figures of question answering: exact match and F1 of words, as SQuAD's evaluation counts them
(arXiv:1606.05250, 1806.03822)."""

from __future__ import annotations

import re
import string
from collections import Counter
from collections.abc import Sequence

import numpy as np

from llmtrain.scoring.figure import RESAMPLES, Figure, bootstrap

FIGURES = ("exact_match", "answer_f1", "answered_f1")
_ARTICLES = re.compile(r"\b(a|an|the)\b")
_PUNCTUATION = str.maketrans("", "", string.punctuation)


def normalized(answer: str) -> list[str]:
    """Return the words of an answer in lower case, without punctuation and articles."""
    return _ARTICLES.sub(" ", answer.lower().translate(_PUNCTUATION)).split()


def exact_match(said: str, answers: Sequence[str]) -> float:
    """Return 1 if the answer is one of those, else 0. No answers: the right answer is none, ""."""
    return float(any(normalized(said) == normalized(answer) for answer in answers or [""]))


def overlap(said: str, answers: Sequence[str]) -> float:
    """Return the best F1 of the words of an answer and those of each right answer."""
    return max(_overlap(normalized(said), normalized(answer)) for answer in answers or [""])


def _overlap(said: Sequence[str], there: Sequence[str]) -> float:
    if not said or not there:
        return float(list(said) == list(there))
    common = sum((Counter(said) & Counter(there)).values())
    return 2 * common / (len(said) + len(there))


def answer_figures(
    said: Sequence[str], answers: Sequence[Sequence[str]], intervals: bool = True
) -> dict[str, Figure]:
    """Return exact match and F1, over all questions and, where some have none, over those with an answer."""
    pairs = list(zip(said, answers, strict=True))
    exact = np.array([exact_match(*pair) for pair in pairs])
    shared = np.array([overlap(*pair) for pair in pairs])
    has_answer = np.array([bool(given) for given in answers])

    def of_rows(rows: np.ndarray) -> dict[str, float]:
        found = {"exact_match": float(exact[rows].mean()), "answer_f1": float(shared[rows].mean())}
        if not has_answer.all():
            answered = rows[has_answer[rows]]
            found["answered_f1"] = float(shared[answered].mean()) if len(answered) else float("nan")
        return found

    return bootstrap(of_rows, len(pairs), RESAMPLES if intervals else 0)
