"""Write word vectors: word2vec's text and binary forms, and what gensim's KeyedVectors.load reads."""

from __future__ import annotations

import pickle
from pathlib import Path
from typing import IO, Literal

import numpy as np

from llmtrain import files
from llmtrain.errors import DataError, Problem
from llmtrain.vectors.keyed import WordVectors

WrittenFormat = Literal["text", "binary", "gensim"]
_CLASS = b"cgensim.models.keyedvectors\nKeyedVectors\n"
_PROTOCOL = 3
"""The last one without frames, so that a pickled dict can stand inside another pickle."""


def write_file(vectors: WordVectors, path: Path, form: WrittenFormat) -> None:
    """Write vectors to a file, atomically. The text form has as many digits as it takes to read equal
    vectors.

    Raise DataError for a word that the form cannot hold, and if the file cannot be written."""
    writers = {"text": _write_text, "binary": _write_binary, "gensim": _write_gensim}
    if form != "gensim":
        _refuse_spaces(vectors, path, form)
    try:
        with files.atomic_writer(path) as file:
            writers[form](vectors, file)
    except OSError as error:
        raise DataError(files.disk_problem(error, path, key="output")) from error


def _refuse_spaces(vectors: WordVectors, path: Path, form: str) -> None:
    bad = next((word for word in vectors.words if not word or len(word.split()) != 1), None)
    if bad is not None:
        got = f"the word {bad!r} in word2vec's {form} form, where a space ends a word"
        raise DataError(Problem(str(path), got, "words without spaces", "give format=gensim"))


def _write_text(vectors: WordVectors, file: IO[bytes]) -> None:
    file.write(f"{len(vectors.words)} {vectors.dimensions}\n".encode())
    for word, row in zip(vectors.words, np.asarray(vectors.matrix, np.float32), strict=True):
        file.write(f"{word} {' '.join(_digits(row))}\n".encode())


def _digits(row: np.ndarray) -> list[str]:
    """Return the shortest texts that are read as the same float32 numbers."""
    return [np.format_float_scientific(x, unique=True, trim="-") for x in row]


def _write_binary(vectors: WordVectors, file: IO[bytes]) -> None:
    file.write(f"{len(vectors.words)} {vectors.dimensions}\n".encode())
    for word, row in zip(vectors.words, np.asarray(vectors.matrix, "<f4"), strict=True):
        file.write(word.encode() + b" " + row.tobytes())


def _write_gensim(vectors: WordVectors, file: IO[bytes]) -> None:
    """Write the pickle of a KeyedVectors without gensim: its class by name, and its attributes."""
    words = list(vectors.words)
    state = {
        "vector_size": vectors.dimensions,
        "index_to_key": words,
        "key_to_index": {word: row for row, word in enumerate(words)},
        "vectors": np.ascontiguousarray(vectors.matrix, dtype=np.float32),
        "norms": None,
        "next_index": len(words),
        "expandos": {} if vectors.counts is None else {"count": np.asarray(vectors.counts, np.int64)},
        "mapfile_path": None,
    }
    body = pickle.dumps(state, _PROTOCOL)
    assert body[:2] == bytes((0x80, _PROTOCOL))
    assert body.endswith(b".")
    # A new object of the class without arguments, whose state the dict is.
    file.write(body[:2] + _CLASS + b")\x81" + body[2:-1] + b"b.")
