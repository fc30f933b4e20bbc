"""Read files of word vectors: word2vec's text and binary forms, GloVe's text, fastText's `.vec` and `.bin`,
and what gensim's KeyedVectors.save wrote. Nothing is unpickled.

Each reader raises DataError, which names the file, for one that is cut short or of another form.
"""

from __future__ import annotations

import os
import struct
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import IO, Any, Literal

import numpy as np

from llmtrain.errors import DataError, Problem
from llmtrain.files import open_regular
from llmtrain.vectors import pickled
from llmtrain.vectors.keyed import WordVectors
from llmtrain.vectors.ngrams import Subwords

FileFormat = Literal["auto", "text", "binary", "gensim", "fasttext"]
ALLOWED = "vectors in word2vec's text or binary form, fastText's .vec or .bin, or gensim's KeyedVectors"
FASTTEXT_MAGIC, FASTTEXT_VERSION = 793712314, 12
LONGEST_WORD = 4096
"""Most bytes of a word in a binary file."""
LONGEST_LINE = 1 << 20
"""Most bytes of a line in a text file: ten thousand dimensions have a tenth of it."""
MOST_PICKLED = 4 << 30
_FASTTEXT_ARGS = 12
_FLOAT = np.dtype("<f4")


class _FormError(ValueError):
    """A file holds something else than its form requires; the message says what was found."""


def read_file(path: Path, form: FileFormat = "auto") -> WordVectors:
    """Return the vectors of a file. Raise DataError for an unreadable one.

    form: auto tells by the beginning of the file."""
    readers: dict[str, Callable[[IO[bytes], Path], WordVectors]] = {
        "text": _read_text,
        "binary": _read_binary,
        "gensim": _read_gensim,
        "fasttext": _read_fasttext,
    }
    with _told(path), open(path, "rb", opener=open_regular) as file:
        chosen = _form_of(file) if form == "auto" else form
        file.seek(0)
        return readers[chosen](file, path)


@contextmanager
def _told(path: Path) -> Iterator[None]:
    """Raise an error about a file as DataError."""
    try:
        yield
    except OSError as error:
        raise DataError(
            Problem(str(path), error.strerror or str(error), ALLOWED, "check the name")
        ) from error
    except (ValueError, struct.error) as error:
        raise DataError(Problem(str(path), str(error), ALLOWED, "copy it again, or name its form")) from error


def _form_of(file: IO[bytes]) -> str:
    head = file.read(4096)
    if head[:1] == b"\x80" and head[1:2] <= b"\x05":
        return "gensim"
    if head[:4] == struct.pack("<i", FASTTEXT_MAGIC):
        return "fasttext"
    first, _, rest = head.partition(b"\n")
    if _sizes(first) is None:
        return "text"  # GloVe's, which has no first line of sizes
    # The numbers of the binary form have bytes that no text has.
    _, _, numbers = rest.partition(b" ")
    return "text" if not numbers or _is_text(numbers.split(b"\n")[0][:64]) else "binary"


def _is_text(piece: bytes) -> bool:
    return all(0x20 <= byte < 0x7F or byte in b"\t\r\n" for byte in piece)


def _sizes(line: bytes) -> tuple[int, int] | None:
    """Return the number of words and of dimensions that a first line says, None if it says none."""
    parts = line.split()
    if len(parts) != 2 or not all(part.isdigit() and len(part) < 12 for part in parts):
        return None
    return int(parts[0]), int(parts[1])


def _header(file: IO[bytes], path: Path, bytes_of_word: int) -> tuple[int, int]:
    """Return the sizes that the first line says, once the file is long enough for them."""
    sizes = _sizes(file.readline(LONGEST_LINE))
    if sizes is None or 0 in sizes:
        raise _FormError("no first line with the number of words and of dimensions")
    count, dimensions = sizes
    least, held = count * (dimensions * bytes_of_word + 2), os.fstat(file.fileno()).st_size
    if held - file.tell() < least - 1:
        got = f"{held:,} bytes, too few for {count:,} words of {dimensions:,} dimensions"
        raise _FormError(f"{got}, as its first line says: it is cut short, or of another dimension")
    return count, dimensions


def _read_text(file: IO[bytes], path: Path) -> WordVectors:
    first = file.readline(LONGEST_LINE)
    expected = _sizes(first)
    file.seek(0)
    if expected is not None:
        expected = _header(file, path, bytes_of_word=2)
    words: list[str] = []
    rows: list[np.ndarray] = []
    dimensions = None if expected is None else expected[1]
    for number, line in enumerate(iter(lambda: file.readline(LONGEST_LINE), b""), 1 + (expected is not None)):
        word, _, numbers = line.rstrip(b"\r\n").rstrip(b" ").partition(b" ")
        try:
            row = np.array(numbers.split(), dtype=np.float32)
        except ValueError:
            raise _FormError(f"line {number:,}: no word and numbers") from None
        if dimensions is None:
            dimensions = len(row)
        if len(row) != dimensions or not len(row):
            raise _FormError(f"line {number:,}: {len(row):,} numbers in place of {dimensions or 1:,}")
        if not np.isfinite(row).all():
            raise _FormError(f"line {number:,}: a number that is not finite")
        words.append(word.decode("utf-8", "replace"))
        rows.append(row)
    if not rows or (expected is not None and len(rows) != expected[0]):
        got = f"{len(rows):,} words" + ("" if expected is None else f" in place of {expected[0]:,}")
        raise _FormError(got)
    return _vectors(words, np.stack(rows), path)


def _read_binary(file: IO[bytes], path: Path) -> WordVectors:
    count, dimensions = _header(file, path, bytes_of_word=_FLOAT.itemsize)
    matrix = np.empty((count, dimensions), np.float32)
    words: list[str] = []
    size = dimensions * _FLOAT.itemsize
    for row in range(count):
        words.append(_word(file, b" ", row).lstrip(b"\n").decode("utf-8", "replace"))
        content = file.read(size)
        if len(content) < size:
            raise _FormError(f"an end amid the numbers of word {row + 1:,} of {count:,}: it is cut short")
        matrix[row] = np.frombuffer(content, _FLOAT)
    if file.read(2).strip(b"\n"):
        raise _FormError(
            f"more bytes than {count:,} words of {dimensions:,} dimensions have: another dimension"
        )
    if not np.isfinite(matrix).all():
        raise _FormError(f"numbers that are not finite: its vectors have not {dimensions:,} dimensions")
    return _vectors(words, matrix, path)


def _word(file: IO[bytes], end: bytes, row: int) -> bytes:
    """Read up to and without the byte `end`."""
    word = bytearray()
    while (byte := file.read(1)) != end:
        if not byte or len(word) > LONGEST_WORD:
            raise _FormError(f"no end of word {row + 1:,}: it is cut short, or of another dimension")
        word += byte
    return bytes(word)


def _read_gensim(file: IO[bytes], path: Path) -> WordVectors:
    if os.fstat(file.fileno()).st_size > MOST_PICKLED:
        raise _FormError(f"a pickle of more than {MOST_PICKLED:,} bytes")
    record = pickled.read(file.read())
    while isinstance(record, pickled.Record) and isinstance(record.state.get("wv"), pickled.Record):
        record = pickled.Record(record.state["wv"].cls, pickled.finished(record.state["wv"]).state)
    state = record.state if isinstance(record, pickled.Record) else {}
    matrix, words = state.get("vectors"), state.get("index_to_key")
    if matrix is None and "vectors" in state.get("__numpys", ()):
        beside = path.with_name(f"{path.name}.vectors.npy")
        with open(beside, "rb", opener=open_regular) as held:
            matrix = np.load(held, allow_pickle=False)
    if not isinstance(matrix, np.ndarray) or matrix.ndim != 2 or not isinstance(words, list):
        raise _FormError("a pickle that holds no KeyedVectors of gensim 4")
    if len(words) != len(matrix):
        raise _FormError(f"{len(words):,} words with {len(matrix):,} vectors")
    counts = (state.get("expandos") or {}).get("count")
    counts = counts if isinstance(counts, np.ndarray) and len(counts) == len(words) else None
    return _vectors(list(map(str, words)), matrix.astype(np.float32), path, counts)


def _read_fasttext(file: IO[bytes], path: Path) -> WordVectors:
    """Read the form of fastText 0.9 (version 12), without quantization."""
    magic, version = struct.unpack("<ii", _exactly(file, 8))
    if (magic, version) != (FASTTEXT_MAGIC, FASTTEXT_VERSION):
        raise _FormError(f"fastText's version {version}, not {FASTTEXT_VERSION}")
    settings = struct.unpack(f"<{_FASTTEXT_ARGS}id", _exactly(file, 4 * _FASTTEXT_ARGS + 8))
    dimensions, buckets, shortest, longest = settings[0], settings[8], settings[9], settings[10]
    size, num_words, _, _, pruned = struct.unpack("<iiiqq", _exactly(file, 28))
    left = os.fstat(file.fileno()).st_size - file.tell()
    if not 0 < num_words <= size or 10 * size > left or pruned > 0:
        raise _FormError(
            f"a dictionary of {num_words:,} words, {size:,} entries and {pruned:,} pruned n-grams"
        )
    words: list[str] = []
    counts = np.empty(num_words, np.int64)
    for row in range(size):
        word = _word(file, b"\0", row)
        count, kind = struct.unpack("<qb", _exactly(file, 9))
        if kind == 0 and row < num_words:
            words.append(word.decode("utf-8", "replace"))
            counts[row] = count
    if len(words) != num_words:
        raise _FormError(f"{len(words):,} words in place of {num_words:,}")
    (is_quantized,) = struct.unpack("<?", _exactly(file, 1))
    if is_quantized:
        raise _FormError("quantized vectors (.ftz); give the .bin that they were made of")
    rows, columns = struct.unpack("<qq", _exactly(file, 16))
    if columns != dimensions or rows != num_words + buckets or buckets < 0:
        got = f"a matrix of {rows:,} × {columns:,}"
        raise _FormError(f"{got} for {num_words:,} words, {buckets:,} n-grams and {dimensions:,} dimensions")
    matrix = np.frombuffer(_exactly(file, rows * columns * 4), _FLOAT).reshape(rows, columns)
    _, out_rows, out_columns = struct.unpack("<?qq", _exactly(file, 17))
    left = os.fstat(file.fileno()).st_size - file.tell()
    if left < out_rows * out_columns * 4:
        raise _FormError(
            f"{left:,} bytes of the output's {out_rows:,} × {out_columns:,} numbers: it is cut short"
        )
    subwords = Subwords(matrix[num_words:], shortest, longest) if buckets and longest else None
    return WordVectors(words, composed(words, matrix[:num_words], subwords), counts, subwords, str(path))


def composed(words: list[str], own: np.ndarray, subwords: Subwords | None) -> np.ndarray:
    """Return the vectors of words as FastText uses them: the mean of a word's own and those of its
    n-grams."""
    if subwords is None:
        return np.asarray(own, dtype=np.float32)
    matrix = np.array(own, dtype=np.float32)
    for row, word in enumerate(words):
        rows = subwords.buckets_of(word)
        matrix[row] = (matrix[row] + subwords.matrix[rows].sum(axis=0)) / (1 + len(rows))
    return matrix


def _exactly(file: IO[bytes], size: int) -> bytes:
    content = b"" if size < 0 or size > os.fstat(file.fileno()).st_size else file.read(size)
    if len(content) != size:
        raise _FormError(f"an end where {size:,} more bytes should be: it is cut short")
    return content


def _vectors(
    words: list[str], matrix: np.ndarray, path: Path, counts: np.ndarray | None = None
) -> WordVectors:
    if len(set(words)) < len(words):
        seen: set[str] = set()
        twice = next(word for word in words if word in seen or seen.add(word))  # type: ignore[func-returns-value]
        raise _FormError(f"the word {twice!r} twice")
    return WordVectors(words, matrix, counts, None, str(path))


def facts(vectors: WordVectors) -> dict[str, Any]:
    """Return a command's description of vectors, as JSON."""
    return {
        "source": vectors.source,
        "words": len(vectors.words),
        "dimensions": vectors.dimensions,
        "subwords": 0 if vectors.subwords is None else len(vectors.subwords.matrix),
    }
