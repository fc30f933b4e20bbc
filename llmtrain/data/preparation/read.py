"""Raw source files → batches of raw documents, in bounded memory, in parts that cores can share."""

from __future__ import annotations

import codecs
import gzip
import zlib
from collections.abc import Iterator
from pathlib import Path

from llmtrain.data.preparation import streams
from llmtrain.data.preparation.clean import CleanCounts
from llmtrain.data.preparation.streams import BadZstdError, Batch, Part, line_chunks, open_source
from llmtrain.data.preparation.tables import read_csv, read_parquet
from llmtrain.data.preparation.tars import Vocabulary, read_tar
from llmtrain.data.preparation.texts import read_jsonl, read_paragraphs, read_whole
from llmtrain.errors import DataError, Problem


def read_part(
    part: Part,
    text_field: str,
    txt_document: str,
    scratch: Path,
    vocabulary: Vocabulary | None,
    counts: CleanCounts,
) -> Iterator[Batch]:
    """Raw documents of a part in order, in batches of about BATCH_BYTES. `scratch` takes a compressed
    parquet while it is read. With a vocabulary, documents may be token ids of it. Adds to `counts` what
    is no document.

    Raises DataError that names file and place for anything that cannot be read, and
    UnicodeDecodeError, which `undecodable` turns into one.
    """
    file = part.file
    try:
        if file.kind == "parquet":
            yield from read_parquet(part, text_field, scratch)
        elif file.kind == "csv":
            yield from read_csv(file, text_field)
        elif file.kind == "jsonl":
            yield from read_jsonl(part, text_field)
        elif file.kind == "tar":
            yield from read_tar(file, text_field, vocabulary, counts)
        elif txt_document == "file":
            yield from read_whole(file)
        elif txt_document == "line":
            for _, data in line_chunks(part):
                yield data.removesuffix(b"\n").split(b"\n")
        else:
            yield from read_paragraphs(part, pack=txt_document == "auto")
    except (EOFError, zlib.error, gzip.BadGzipFile, BadZstdError) as error:
        raise DataError(
            Problem(file.name, f"damaged .{file.compression} data ({error})", "", "copy or download it again")
        ) from error
    except (PermissionError, FileNotFoundError) as error:
        raise DataError(Problem(file.name, str(error.strerror), "a readable file")) from error


def undecodable(part: Part) -> DataError:
    """The error that names the first byte of the part's file that is no UTF-8."""
    file = part.file
    where = "in a value of the text field"
    if file.kind != "parquet":
        decoder = codecs.getincrementaldecoder("utf-8")()
        with open_source(file) as stream:
            offset = 0
            while True:
                data = stream.read(streams.BATCH_BYTES)
                pending = len(decoder.getstate()[0])
                try:
                    decoder.decode(data, final=not data)
                except UnicodeDecodeError as error:
                    byte = error.object[error.start]
                    where = f"0x{byte:02x} at byte {offset - pending + error.start}"
                    break
                if not data:
                    break
                offset += len(data)
        if file.compression:
            where += " of the uncompressed text"
    return DataError(
        Problem(file.name, f"bytes that are no UTF-8: {where}", "UTF-8", "convert it, with iconv say")
    )
