"""The words of a text and how often each occurs, counted in bounded memory, and the file that holds them."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path

import numpy as np

from llmtrain import files
from llmtrain.errors import DataError, Problem
from llmtrain.files import open_regular

VOCABULARY = "vocabulary.tsv"
"""File of a run's words/ and of each checkpoint: a word and its count on each line, the most frequent
first."""
LONGEST_LINE = 1 << 16


def words_of(text: str, pattern: re.Pattern[str], lower: bool) -> list[str]:
    """Return the words of a text: what the pattern finds, in lower case where `lower` says so."""
    return pattern.findall(text.lower() if lower else text)


class WordCounts:
    """Counts words. When more than `most` different ones are held, the rarest are forgotten, as word2vec does
    (Mikolov's ReduceVocab): first those seen once, then those seen twice, and so on."""

    def __init__(self, most: int) -> None:
        self._most, self._forgotten_up_to = most, 0
        self.counts: Counter[str] = Counter()
        self.total = 0

    def add(self, words: Sequence[str]) -> None:
        self.total += len(words)
        self.counts.update(words)
        while len(self.counts) > self._most:
            self._forgotten_up_to += 1
            least = self._forgotten_up_to
            self.counts = Counter({word: n for word, n in self.counts.items() if n > least})

    @property
    def forgotten_up_to(self) -> int:
        """Words that were seen this often may have been forgotten; 0: none was."""
        return self._forgotten_up_to

    def vocabulary(self, min_count: int, max_words: int | None) -> tuple[list[str], np.ndarray]:
        """Return the words that occur at least `min_count` times, of these the `max_words` most frequent, and
        their counts, int64; of equally frequent words the one first in the alphabet comes first.

        Raise DataError if none is left."""
        kept = [(word, n) for word, n in self.counts.items() if n >= min_count]
        if not kept:
            most = max(self.counts.values(), default=0)
            got = f"{min_count}, which leaves none of {len(self.counts):,} words"
            allowed = (
                f"1 to {most:,}, as often as the most frequent word occurs" if most else "a text with words"
            )
            raise DataError(
                Problem("model.min_count", got, allowed, "lower it, or give more text in data.path")
            )
        kept.sort(key=lambda item: (-item[1], item[0]))
        kept = kept[:max_words]
        return [word for word, _ in kept], np.array([n for _, n in kept], np.int64)


def write_vocabulary(path: Path, words: Iterable[str], counts: np.ndarray) -> None:
    """Write a vocabulary, atomically."""
    lines = (f"{word}\t{count}\n" for word, count in zip(words, counts.tolist(), strict=True))
    with files.atomic_writer(path) as file:
        file.writelines(line.encode("utf-8", "surrogatepass") for line in lines)


def read_vocabulary(path: Path) -> tuple[list[str], np.ndarray]:
    """Return words and counts of a file that write_vocabulary wrote. Raise DataError for another file."""
    words: list[str] = []
    counts: list[int] = []
    try:
        for word, count in _lines(path):
            words.append(word)
            counts.append(int(count))
    except (OSError, ValueError) as error:
        allowed, remedy = "a word, a tab and a count on each line", "remove it, so that it is counted anew"
        raise DataError(Problem(str(path), f"an unreadable vocabulary ({error})", allowed, remedy)) from None
    return words, np.array(counts, np.int64)


def _lines(path: Path) -> Iterator[tuple[str, str]]:
    with open(path, "rb", opener=open_regular) as file:
        while line := file.readline(LONGEST_LINE):
            word, tab, count = line.decode("utf-8", "surrogatepass").rstrip("\n").rpartition("\t")
            if not tab:
                raise ValueError("a line without a tab")
            yield word, count
