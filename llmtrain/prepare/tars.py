"""Read documents of webdataset .tar files: consecutive members with the same key form one sample.

The key is the name of a member up to the first dot of its last component. The document of a sample is its
`.txt`, or else the text field of its `.json`. With a given tokenizer, its `.npy`, the token ids of a
document, takes precedence.
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
from llmtrain.prepare import source_file
from llmtrain.prepare.clean import CleanCounts
from llmtrain.prepare.decompress import open_source
from llmtrain.prepare.folder_scan import short_name
from llmtrain.prepare.source_file import (
    TOKEN_DTYPE,
    Batch,
    SourceFile,
    Tokens,
    decoded,
    refuse_utf16,
)
from llmtrain.prepare.tar_members import tar_members
from llmtrain.prepare.texts import text_of_object

ARRAYS = ("npy", "tokens.npy")
"""Extensions of arrays of token ids; `llmtrain prepare` writes the second."""
TEXTS = ("txt", "json")


@dataclass(frozen=True)
class Vocabulary:
    """The vocabulary to which given token ids must belong."""

    size: int
    eos_id: int


def read_tar(
    file: SourceFile, text_field: str, vocabulary: Vocabulary | None, counts: CleanCounts
) -> Iterator[Batch]:
    """Yield the documents in order, in batches of either str or token ids. In an array of token ids, eos ends
    a document. Add the number of members without a document to `counts`.

    Raise DataError that names file and member.
    """
    batch: list[str] | Tokens = []
    size = 0
    with open_source(file) as stream:
        for document in _samples(stream, file, text_field, vocabulary, counts):
            kind = str if isinstance(document, str) else np.ndarray
            full = size >= source_file.BATCH_BYTES or len(batch) >= source_file.BATCH_DOCUMENTS
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
    """Yield the documents of all samples. A member that repeats key and extension begins a new sample."""
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
        where = f"{file.name} member {short_name(name)}"
        if chosen in ARRAYS:
            assert vocabulary is not None
            return _tokens(data, where, vocabulary)
        text = decoded(data.removeprefix(codecs.BOM_UTF8), where)
        refuse_utf16(data, where)
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
    """Return whether the member describes the whole tar file, such as `__meta__.json` of webdataset."""
    stem, _, ending = PurePosixPath(name).name.partition(".")
    return stem.startswith("__") and stem.endswith("__") and ending != "txt"


def _tokens(data: bytes, where: str, vocabulary: Vocabulary) -> Iterator[np.ndarray]:
    """Yield the documents of an array of ids. A list of many short documents would need far more memory."""
    try:
        ids = parse_array(data)
        if ids.ndim != 1 or ids.dtype.kind not in "iu":
            raise ValueError(f"an array of {ids.dtype} with {ids.ndim} dimensions")
    except ValueError as error:
        raise DataError(Problem(where, str(error), "a complete .npy of integers in one dimension")) from error
    if len(ids) and not (ids.min() >= 0 and ids.max() < vocabulary.size):
        wrong = ids.min() if ids.min() < 0 else ids.max()
        got = f"the token id {wrong}"
        allowed = f"0 to {vocabulary.size - 1}, the vocabulary of tokenizer.model=…"
        raise DataError(Problem(where, got, allowed, "give the tokenizer that made the ids"))
    start: Any = 0
    for first in range(0, len(ids), source_file.BATCH_BYTES):
        for end in np.flatnonzero(ids[first : first + source_file.BATCH_BYTES] == vocabulary.eos_id) + first:
            yield ids[start:end].astype(TOKEN_DTYPE)
            start = end + 1
    if start < len(ids) or not start:
        yield ids[start:].astype(TOKEN_DTYPE)
