"""Documents of .tar files made for webdataset: consecutive members of one key are one sample.

A key is a member's name up to the first dot of its last part. A sample's document is its `.txt`, or else
the text field of its `.json`; with a given tokenizer, its `.npy`, ids of a document already tokenized,
goes before both.
"""

from __future__ import annotations

import codecs
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import PurePosixPath
from typing import IO, Any

import numpy as np

from llmtrain.corpus.npy import parse_array
from llmtrain.errors import DataError, Problem
from llmtrain.prepare import streams
from llmtrain.prepare.clean import CleanCounts
from llmtrain.prepare.opening import open_source
from llmtrain.prepare.scan import brief
from llmtrain.prepare.streams import (
    TOKEN_DTYPE,
    Batch,
    SourceFile,
    Tokens,
    decoded,
    refuse_wide,
)
from llmtrain.prepare.tar_members import tar_members
from llmtrain.prepare.texts import text_of_object

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

    Raise DataError with the names of file and member.
    """
    batch: list[str] | Tokens = []
    size = 0
    with open_source(file) as stream:
        for document in _samples(stream, file, text_field, vocabulary, counts):
            kind = str if isinstance(document, str) else np.ndarray
            full = size >= streams.BATCH_BYTES or len(batch) >= streams.BATCH_DOCUMENTS
            if full or (batch and not isinstance(batch[0], kind)):
                yield batch
                batch, size = [], 0
            if not batch:
                batch = [] if kind is str else Tokens()
            batch.append(document)  # type: ignore[arg-type]
            size += len(document)
    if batch:
        yield batch


def _samples(
    stream: IO[bytes],
    file: SourceFile,
    text_field: str,
    vocabulary: Vocabulary | None,
    counts: CleanCounts,
) -> Iterator[str | np.ndarray]:
    """The documents of all samples. A second member of one key and ending begins a sample."""
    endings = (*(ARRAYS if vocabulary else ()), *TEXTS)
    wanted = lambda name: not _is_metadata(name) and _key_and_ending(name)[1] in endings  # noqa: E731
    key = ""
    found: dict[str, tuple[str, bytes]] = {}

    def documents() -> Iterable[str] | Iterable[np.ndarray]:
        chosen = next((ending for ending in endings if ending in found), None)
        if chosen is None:
            return []
        counts.members_ignored += len(found) - 1
        name, data = found[chosen]
        where = f"{file.name} member {brief(name)}"
        if chosen in ARRAYS:
            assert vocabulary is not None
            return _tokens(data, where, vocabulary)
        text = decoded(data.removeprefix(codecs.BOM_UTF8), where)
        refuse_wide(data, where)
        return [text] if chosen == "txt" else text_of_object(text, where, [text_field], "one JSON object")

    for name, data in tar_members(stream, file.name, wanted):
        if data is None:
            counts.members_ignored += 1
            continue
        sample, ending = _key_and_ending(name)
        counts.members_repeated += sample == key and ending in found
        if sample != key or ending in found:
            yield from documents()
            key, found = sample, {}
        found[ending] = (name, data)
    yield from documents()


def _key_and_ending(name: str) -> tuple[str, str]:
    path = PurePosixPath(name)
    stem, _, ending = path.name.partition(".")
    return str(path.parent / stem), ending.lower()


def _is_metadata(name: str) -> bool:
    """Of the whole tar, as webdataset's writers name it: `__meta__.json`."""
    stem, _, ending = PurePosixPath(name).name.partition(".")
    return stem.startswith("__") and stem.endswith("__") and ending != "txt"


def _tokens(data: bytes, where: str, vocabulary: Vocabulary) -> Iterator[np.ndarray]:
    """The documents of an array, one at a time: as a list, many short ones take far more than the array."""
    try:
        ids = parse_array(data)
        if ids.ndim != 1 or ids.dtype.kind not in "iu":
            raise ValueError(f"an array of {ids.dtype} with {ids.ndim} dimensions")
    except ValueError as error:
        raise DataError(Problem(where, str(error), "a whole .npy of integers in one dimension")) from error
    if len(ids) and not (ids.min() >= 0 and ids.max() < vocabulary.size):
        wrong = ids.min() if ids.min() < 0 else ids.max()
        got = f"the token id {wrong}"
        allowed = f"0 to {vocabulary.size - 1}, the vocabulary of tokenizer.model=…"
        raise DataError(Problem(where, got, allowed, "give the tokenizer that made it"))
    start: Any = 0
    for place in range(0, len(ids), streams.BATCH_BYTES):
        for end in np.flatnonzero(ids[place : place + streams.BATCH_BYTES] == vocabulary.eos_id) + place:
            yield ids[start:end].astype(TOKEN_DTYPE)
            start = end + 1
    if start < len(ids) or not start:
        yield ids[start:].astype(TOKEN_DTYPE)
