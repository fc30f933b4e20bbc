"""Read parts of source files as batches of raw documents, in bounded memory."""

from __future__ import annotations

import codecs
from collections.abc import Iterator, Sequence
from pathlib import Path

from llmtrain.errors import DataError, Problem
from llmtrain.prepare import source_file
from llmtrain.prepare.clean import CleanCounts
from llmtrain.prepare.decompress import open_source
from llmtrain.prepare.delimited import read_delimited
from llmtrain.prepare.parquet import read_parquet
from llmtrain.prepare.source_file import (
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
    """Yield the raw documents of a part in order, in batches of about BATCH_BYTES; pairs for two fields.

    scratch: folder for an uncompressed copy of a compressed parquet file.
    vocabulary: if given, documents may be token ids of it.
    counts: updated with the entries that are not documents.
    Raise DataError that names file and location of unreadable data, or UnicodeDecodeError, which the caller
    passes to `undecodable`.
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
    """Return an error that names the first byte that is not UTF-8 in the part's file or its file of
    targets."""
    found = ((file, _first_undecodable(file)) for file in part.file.files)
    name, where = next((file.name, where) for file, where in found if where)
    return DataError(
        Problem(
            name, f"bytes that are not UTF-8: {where}", "UTF-8", "convert the file, for example with iconv"
        )
    )


def _first_undecodable(file: SourceFile) -> str:
    """Describe the first byte that is not UTF-8 and its offset; return "" if there is none."""
    decoder = codecs.getincrementaldecoder("utf-8")()
    of = " of the uncompressed text" if file.compression else ""
    with open_source(file) as stream:
        offset = 0
        while True:
            data = stream.read(source_file.BATCH_BYTES)
            pending = len(decoder.getstate()[0])
            try:
                decoder.decode(data, final=not data)
            except UnicodeDecodeError as error:
                byte = error.object[error.start]
                return f"0x{byte:02x} at byte {offset - pending + error.start}{of}"
            if not data:
                return ""
            offset += len(data)
