"""Words with their vectors: nearest words, analogies, similarities."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from functools import cached_property

import numpy as np

from llmtrain.errors import DataError, Problem, nearest
from llmtrain.vectors.ngrams import Subwords

VECTORS, GRAMS = "vectors", "grams"
"""Tensors of imports: vectors as their file has them, and those of n-grams."""
BLOCK_ELEMENTS = 1 << 24
"""Similarities that are held at once."""


@dataclass(frozen=True)
class WordVectors:
    """Words, the most frequent first, with their vectors; with `subwords` also those of words never seen."""

    words: Sequence[str]
    matrix: np.ndarray
    """(words, dimensions) float32."""
    counts: np.ndarray | None = None
    """How often each word was seen; None: not known."""
    subwords: Subwords | None = None
    """The vectors of character n-grams (FastText); None: words that were not seen have no vector."""
    source: str = "the vectors"
    """Where they were read, for messages."""

    @cached_property
    def index(self) -> dict[str, int]:
        """Word → its row."""
        return {word: row for row, word in enumerate(self.words)}

    @property
    def dimensions(self) -> int:
        return int(self.matrix.shape[1])

    @cached_property
    def directions(self) -> np.ndarray:
        """The vectors divided by their lengths; a vector of zeros stays one."""
        return directions_of(self.matrix)

    def __contains__(self, word: str) -> bool:
        return word in self.index or (self.subwords is not None and bool(self.subwords.buckets_of(word)))

    def vector(self, word: str, key: str = "word") -> np.ndarray:
        """Return the vector of a word, (dimensions,); of one that was never seen, the mean of those of its
        n-grams. Raise DataError, which names the nearest words, if it has none."""
        row = self.index.get(word)
        if row is not None:
            return np.asarray(self.matrix[row], dtype=np.float32)
        found = None if self.subwords is None else self.subwords.vector(word)
        if found is None:
            raise DataError(self.unknown(word, key))
        return found

    def unknown(self, word: str, key: str = "word") -> Problem:
        """Return the problem of a word without a vector."""
        got = f"{word!r}, which is not among the {len(self.words):,} words of {self.source}"
        lower = word.lower()
        remedy = f"the vocabulary has {lower!r}" if lower in self.index else "choose another word"
        return Problem(key, got, f"words such as {nearest(word, self.words)}", remedy)

    def nearest(self, vector: np.ndarray, top: int, without: Iterable[str] = ()) -> list[tuple[str, float]]:
        """Return the `top` words whose vectors have the largest cosine with `vector`, with the cosines."""
        similarity_V = self.directions @ directions_of(vector[None])[0]
        for word in without:
            if word in self.index:
                similarity_V[self.index[word]] = -np.inf
        top = min(top, len(self.words))
        rows = np.argpartition(-similarity_V, top - 1)[:top]
        rows = rows[np.lexsort((rows, -similarity_V[rows]))]
        return [(self.words[row], float(similarity_V[row])) for row in rows if similarity_V[row] > -np.inf]

    def similarity(self, a: str, b: str) -> float:
        """Return the cosine between the vectors of two words. Raise DataError if one has no vector."""
        pair = directions_of(np.stack([self.vector(a), self.vector(b)]))
        return float(pair[0] @ pair[1])

    def analogy(
        self, a: str, b: str, c: str, top: int, keys: Sequence[str] = ("a", "b", "c")
    ) -> list[tuple[str, float]]:
        """Return the words nearest to b − a + c, without these three (Mikolov et al. 2013, 3CosAdd).

        keys: the names of the three words, for messages."""
        given = np.stack([self.vector(word, key) for word, key in zip((a, b, c), keys, strict=True)])
        a_D, b_D, c_D = directions_of(given)
        return self.nearest(b_D - a_D + c_D, top, (a, b, c))


def directions_of(matrix: np.ndarray) -> np.ndarray:
    """Return the rows divided by their lengths, in float32."""
    matrix = np.asarray(matrix, dtype=np.float32)
    lengths = np.linalg.norm(matrix, axis=1, keepdims=True)
    return matrix / np.where(lengths > 0, lengths, 1)
