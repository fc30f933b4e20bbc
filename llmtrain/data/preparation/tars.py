"""Documents of .tar files made for webdataset: consecutive members of one key are one sample.

A key is a member's name up to the first dot of its last part. A sample's document is its `.txt`, or else
the text field of its `.json`; with a given tokenizer, its `.npy`, ids of a document already tokenized,
goes before both.
"""

from __future__ import annotations

import codecs
import io
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import PurePosixPath
from typing import IO

import numpy as np

from llmtrain.data.preparation import streams
from llmtrain.data.preparation.clean import CleanCounts
from llmtrain.data.preparation.opening import open_source
from llmtrain.data.preparation.scan import shown
from llmtrain.data.preparation.streams import (
    TOKEN_DTYPE,
    Batch,
    SourceFile,
    Tokens,
    decoded,
    refuse_wide,
)
from llmtrain.data.preparation.tar_members import tar_members
from llmtrain.data.preparation.texts import text_of_object
from llmtrain.errors import DataError, Problem

ARRAYS = ("npy", "tokens.npy")
"""Endings of arrays of ids; the second is what `llmtrain prepare` itself writes."""
TEXTS = ("txt", "json")


@dataclass(frozen=True)
class Vocabulary:
    """What ids already tokenized are checked against."""

    size: int
    eos_id: int


def read_tar(
    file: SourceFile, text_field: str, vocabulary: Vocabulary | None, counts: CleanCounts
) -> Iterator[Batch]:
    """Documents in order, in batches of str or of token ids, in which eos ends a document. Adds the members
    that hold no document to `counts`.

    Raises DataError with the names of file and member.
    """
    batch: list[str] | Tokens = []
    size = 0
    with open_source(file) as stream:
        for documents in _samples(stream, file, text_field, vocabulary, counts):
            if size >= streams.BATCH_BYTES or type(batch) is not type(documents):
                if batch:
                    yield batch
                batch, size = type(documents)(), 0
            batch.extend(documents)  # type: ignore[arg-type]
            size += sum(map(len, documents))
    if batch:
        yield batch


def _samples(
    stream: IO[bytes],
    file: SourceFile,
    text_field: str,
    vocabulary: Vocabulary | None,
    counts: CleanCounts,
) -> Iterator[list[str] | Tokens]:
    """The documents of each sample that has any. A second member of one key and ending begins a sample."""
    endings = (*(ARRAYS if vocabulary else ()), *TEXTS)
    wanted = lambda name: not _is_metadata(name) and _key_and_ending(name)[1] in endings  # noqa: E731
    key = ""
    found: dict[str, tuple[str, bytes]] = {}

    def documents() -> list[str] | Tokens:
        chosen = next((ending for ending in endings if ending in found), None)
        if chosen is None:
            return []
        counts.members_ignored += len(found) - 1
        name, data = found[chosen]
        where = f"{file.name} member {shown(name)}"
        if chosen in ARRAYS:
            assert vocabulary is not None
            return _tokens(data, where, vocabulary)
        text = decoded(data.removeprefix(codecs.BOM_UTF8), where)
        refuse_wide(data, where)
        return [text] if chosen == "txt" else text_of_object(text, where, [text_field], "one JSON object")

    for name, data in tar_members(stream, file, wanted):
        if data is None:
            counts.members_ignored += 1
            continue
        sample, ending = _key_and_ending(name)
        counts.members_repeated += sample == key and ending in found
        if sample != key or ending in found:
            if made := documents():
                yield made
            key, found = sample, {}
        found[ending] = (name, data)
    if made := documents():
        yield made


def _key_and_ending(name: str) -> tuple[str, str]:
    path = PurePosixPath(name)
    stem, _, ending = path.name.partition(".")
    return str(path.parent / stem), ending.lower()


def _is_metadata(name: str) -> bool:
    """Of the whole tar, as webdataset's writers name it: `__meta__.json`."""
    stem, _, ending = PurePosixPath(name).name.partition(".")
    return stem.startswith("__") and stem.endswith("__") and ending != "txt"


def _tokens(data: bytes, where: str, vocabulary: Vocabulary) -> Tokens:
    ids = _array(data, where)
    if len(ids) and not (ids.min() >= 0 and ids.max() < vocabulary.size):
        wrong = ids[(ids < 0) | (ids >= vocabulary.size)][0]
        got = f"the token id {wrong}"
        allowed = f"0 to {vocabulary.size - 1}, the vocabulary of tokenizer.model=…"
        raise DataError(Problem(where, got, allowed, "give the tokenizer that made it"))
    ids = ids.astype(TOKEN_DTYPE)
    ends = np.flatnonzero(ids == vocabulary.eos_id)
    pieces = np.split(ids, ends + 1)
    last = pieces.pop()
    return Tokens([*(piece[:-1] for piece in pieces), *([last] if len(last) or not pieces else [])])


def _array(data: bytes, where: str) -> np.ndarray:
    """The integers of a .npy, which are looked at only where the header promises what the file holds."""
    stream = io.BytesIO(data)
    formats = {(1, 0): np.lib.format.read_array_header_1_0, (2, 0): np.lib.format.read_array_header_2_0}
    try:
        version = np.lib.format.read_magic(stream)
        shape, _, dtype = formats[version](stream)
    except Exception as error:
        # numpy evaluates the header as Python: whatever is wrong with it may be raised.
        reason = " ".join(str(error).split())[:200]
        raise DataError(Problem(where, f"no array ({reason})", "a .npy of token ids")) from error
    if len(shape) != 1 or dtype.kind not in "iu":
        got = f"an array of {dtype} with {len(shape)} dimensions"
        raise DataError(Problem(where, got, "integers in one dimension"))
    place = stream.tell()
    if len(data) - place != shape[0] * dtype.itemsize:
        got = f"{len(data) - place:,} bytes of an array of {shape[0]:,} {dtype}"
        raise DataError(Problem(where, got, "a whole .npy", "write it again"))
    return np.frombuffer(data, dtype, offset=place)
