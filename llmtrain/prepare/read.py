"""Raw source files → batches of raw documents, in bounded memory, in parts that cores can share."""

from __future__ import annotations

import codecs
from collections.abc import Iterator, Sequence
from pathlib import Path

from llmtrain.errors import DataError, Problem
from llmtrain.prepare import streams
from llmtrain.prepare.clean import CleanCounts
from llmtrain.prepare.delimited import read_delimited
from llmtrain.prepare.opening import open_source
from llmtrain.prepare.parquet import read_parquet
from llmtrain.prepare.streams import (
    COLUMNS,
    Batch,
    Pairs,
    Part,
    SourceFile,
    line_chunks,
)
from llmtrain.prepare.tars import Vocabulary, read_tar
from llmtrain.prepare.texts import read_jsonl, read_line_pairs, read_paragraphs, read_whole


def read_part(
    part: Part,
    fields: Sequence[str],
    txt_document: str,
    scratch: Path,
    vocabulary: Vocabulary | None,
    counts: CleanCounts,
    quoting: str = "auto",
) -> Iterator[Batch]:
    """Raw documents of a part in order, in batches of about BATCH_BYTES; of two fields, pairs. `scratch`
    takes a compressed parquet while it is read. With a vocabulary, documents may be token ids of it. Adds
    to `counts` what is no document.

    Raise DataError that names file and place for anything that cannot be read, and
    UnicodeDecodeError, which `undecodable` turns into one.
    """
    file = part.file
    if file.target is not None:
        yield from read_line_pairs(file, file.target)
    elif file.kind in COLUMNS:
        columns = {
            "parquet": lambda: read_parquet(part, fields, scratch),
            "csv": lambda: read_delimited(file, fields, quoting, counts),
            "tsv": lambda: read_delimited(file, fields, quoting, counts),
            "jsonl": lambda: read_jsonl(part, fields),
        }[file.kind]()
        yield from (texts[0] if len(texts) == 1 else Pairs(*texts) for texts in columns)
    elif file.kind == "tar":
        yield from read_tar(file, fields[0], vocabulary, counts)
    elif txt_document == "file":
        yield from read_whole(file)
    elif txt_document == "line":
        for _, data in line_chunks(part):
            yield data.removesuffix(b"\n").split(b"\n")
    else:
        yield from read_paragraphs(part, pack=txt_document == "auto")


def undecodable(part: Part) -> DataError:
    """The error that names the first byte of the part's file, or of its targets', that is no UTF-8."""
    found = ((file, _first_undecodable(file)) for file in part.file.files)
    name, where = next((file.name, where) for file, where in found if where)
    return DataError(
        Problem(name, f"bytes that are no UTF-8: {where}", "UTF-8", "convert it, with iconv say")
    )


def _first_undecodable(file: SourceFile) -> str:
    """The byte and its place, or nothing."""
    decoder = codecs.getincrementaldecoder("utf-8")()
    of = " of the uncompressed text" if file.compression else ""
    with open_source(file) as stream:
        offset = 0
        while True:
            data = stream.read(streams.BATCH_BYTES)
            pending = len(decoder.getstate()[0])
            try:
                decoder.decode(data, final=not data)
            except UnicodeDecodeError as error:
                byte = error.object[error.start]
                return f"0x{byte:02x} at byte {offset - pending + error.start}{of}"
            if not data:
                return ""
            offset += len(data)
