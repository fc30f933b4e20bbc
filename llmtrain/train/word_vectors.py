"""Read word vectors from a file in word2vec's text form."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np

from llmtrain.errors import DataError, Problem
from llmtrain.files import open_regular

_ALLOWED = "a first line with the counts of words and numbers, and then a word and its numbers a line"
LONGEST_LINE = 1 << 20


class WordVectors(NamedTuple):
    """Words, the most frequent first, and the vector of each, (words, dimensions) fp32."""

    words: Sequence[str]
    matrix: np.ndarray


def read_vectors(path: Path) -> WordVectors:
    """Return the words and vectors of a file. Raise DataError for one that is damaged or of another form."""
    try:
        with open(path, "rb", opener=open_regular) as file:
            first = file.readline(LONGEST_LINE).split()
            if len(first) != 2 or not all(part.isdigit() for part in first):
                raise DataError(Problem(str(path), "another first line", _ALLOWED))
            count, dimensions = map(int, first)
            words, rows = [], []
            for number, line in enumerate(iter(lambda: file.readline(LONGEST_LINE), b""), 2):
                word, *numbers = line.decode().rstrip().split(" ")
                row = np.array(numbers, np.float32)
                if row.shape != (dimensions,) or not np.isfinite(row).all():
                    got = f"line {number:,} with {len(numbers):,} numbers, or one that is not finite"
                    raise DataError(Problem(str(path), got, f"{dimensions} numbers"))
                words.append(word)
                rows.append(row)
    except OSError as error:
        raise DataError(Problem(str(path), error.strerror or str(error), "a file of word vectors")) from error
    except ValueError as error:
        raise DataError(Problem(str(path), str(error)[:200], _ALLOWED)) from error
    if len(words) != count or not words:
        raise DataError(Problem(str(path), f"{len(words):,} words", f"{count:,}, as its first line says"))
    return WordVectors(words, np.stack(rows))
