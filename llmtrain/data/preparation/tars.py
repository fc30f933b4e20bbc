"""Documents of .tar files made for webdataset: consecutive members of one key are one sample.

A key is a member's name up to the first dot of its last part. A sample's document is its `.txt`, or else
the text field of its `.json`; with a given tokenizer, its `.npy`, ids of a document already tokenized,
goes before both. Reads the stream once, and strictly: tarfile takes a shard that was cut between two
members for whole.
"""

from __future__ import annotations

import codecs
import io
import json
import tarfile
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import PurePosixPath
from typing import IO, Any

import numpy as np

from llmtrain.data.preparation import streams
from llmtrain.data.preparation.clean import CleanCounts
from llmtrain.data.preparation.streams import (
    TOKEN_DTYPE,
    Batch,
    SourceFile,
    Tokens,
    missing_field,
    open_source,
)
from llmtrain.errors import DataError, Problem

BLOCK = tarfile.BLOCKSIZE
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
    """The documents of each sample that has any."""
    endings = (*(ARRAYS if vocabulary else ()), *TEXTS)
    wanted = lambda name: _key_and_ending(name)[1] in endings  # noqa: E731
    key = ""
    found: dict[str, tuple[str, bytes]] = {}

    def documents() -> list[str] | Tokens:
        chosen = next((ending for ending in endings if ending in found), None)
        if chosen is None:
            return []
        counts.members_ignored += len(found) - 1
        name, data = found[chosen]
        where = f"{file.name} member {name}"
        if chosen in ARRAYS:
            assert vocabulary is not None
            return _tokens(data, where, vocabulary)
        return [_text(data, where) if chosen == "txt" else _json_text(data, where, text_field)]

    for name, data in _members(stream, file, wanted):
        sample, ending = _key_and_ending(name)
        if sample != key:
            if made := documents():
                yield made
            key, found = sample, {}
        if data is None:
            counts.members_ignored += 1
        else:
            found[ending] = (name, data)
    if made := documents():
        yield made


def _key_and_ending(name: str) -> tuple[str, str]:
    path = PurePosixPath(name)
    stem, _, ending = path.name.partition(".")
    return str(path.parent / stem), ending.lower()


def _text(data: bytes, where: str) -> str:
    try:
        return data.removeprefix(codecs.BOM_UTF8).decode()
    except UnicodeDecodeError as error:
        got = f"bytes that are no UTF-8: 0x{data[error.start]:02x} at byte {error.start}"
        raise DataError(Problem(where, got, "UTF-8", "convert it, with iconv say")) from error


def _json_text(data: bytes, where: str, text_field: str) -> str:
    try:
        row = json.loads(_text(data, where))
    except (ValueError, RecursionError) as error:
        raise DataError(Problem(where, f"no JSON ({error})", "one JSON object")) from error
    if not isinstance(row, dict):
        raise DataError(Problem(where, f"a JSON {type(row).__name__}", "one JSON object"))
    if text_field not in row:
        raise missing_field(where, [text_field], list(row))
    if not isinstance(row[text_field], str | None):
        got = f"field {text_field} that is a {type(row[text_field]).__name__}"
        raise DataError(Problem(where, got, "text or null"))
    return row[text_field] or ""


def _tokens(data: bytes, where: str, vocabulary: Vocabulary) -> Tokens:
    try:
        ids = np.load(io.BytesIO(data), allow_pickle=False)
    except (ValueError, EOFError) as error:
        raise DataError(Problem(where, f"no array ({error})", "a .npy of token ids")) from error
    if ids.ndim != 1 or ids.dtype.kind not in "iu":
        got = f"an array of {ids.dtype} with {ids.ndim} dimensions"
        raise DataError(Problem(where, got, "integers in one dimension"))
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


# --------------------------------------------------------------------------------------------- tar


def _members(stream: IO[bytes], file: SourceFile, wanted: Any) -> Iterator[tuple[str, bytes | None]]:
    """(name, content) of every plain file; no content where the name is not `wanted`."""
    long_name, global_name = "", ""
    offset = 0

    def read(count: int, what: str) -> bytes:
        nonlocal offset
        data = stream.read(count)
        if len(data) != count:
            got = f"a truncated tar: it ends after {offset + len(data):,} bytes, inside {what}"
            raise DataError(Problem(file.name, got, "a whole tar", "copy or download it again"))
        offset += count
        return data

    def content(size: int, what: str) -> bytes:
        if size > streams.LONGEST_LINE:
            got = f"{what} of more than {streams.LONGEST_LINE >> 20} MiB"
            raise DataError(Problem(file.name, got, "", "cut it into smaller documents"))
        return read(-(-size // BLOCK) * BLOCK, what)[:size]

    def skip(size: int, what: str) -> None:
        left = -(-size // BLOCK) * BLOCK
        while left:
            left -= len(read(min(left, streams.BATCH_BYTES), what))

    while True:
        header = read(BLOCK, "its list of members: no end mark")
        if not any(header):
            return
        try:
            member = tarfile.TarInfo.frombuf(header, "utf-8", "surrogateescape")
        except tarfile.HeaderError as error:
            got = f"a damaged tar ({error} at byte {offset - BLOCK:,})"
            raise DataError(Problem(file.name, got, "a tar", "copy or download it again")) from error
        what = f"member {member.name}"
        if member.type == tarfile.GNUTYPE_LONGNAME:
            long_name = content(member.size, what).rstrip(b"\0").decode("utf-8", "surrogateescape")
        elif member.type in (tarfile.XHDTYPE, tarfile.XGLTYPE, tarfile.SOLARIS_XHDTYPE):
            records = _pax_records(content(member.size, what), file)
            if "size" in records:
                got = "a member of more than 8 GiB"
                raise DataError(Problem(file.name, got, "", "cut it into smaller documents"))
            if member.type == tarfile.XGLTYPE:
                global_name = records.get("path", global_name)
            else:
                long_name = records.get("path", long_name)
        else:
            name, long_name = long_name or global_name or member.name, ""
            if not member.isreg():
                skip(0 if member.type in (tarfile.LNKTYPE, tarfile.SYMTYPE) else member.size, what)
            elif wanted(name):
                yield name, content(member.size, f"member {name}")
            else:
                skip(member.size, f"member {name}")
                yield name, None


def _pax_records(data: bytes, file: SourceFile) -> dict[str, str]:
    """POSIX.1-2001 extended header: records `LENGTH KEY=VALUE\\n`."""
    records: dict[str, str] = {}
    while data:
        length, space, _ = data.partition(b" ")
        if not space or not length.isdigit() or not len(length) + 3 <= int(length) <= len(data):
            raise DataError(Problem(file.name, "a damaged tar (an extended header)", "a tar"))
        key, _, value = data[len(length) + 1 : int(length) - 1].partition(b"=")
        records[key.decode("utf-8", "replace")] = value.decode("utf-8", "surrogateescape")
        data = data[int(length) :]
    return records
