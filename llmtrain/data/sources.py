"""Raw text files → batches of raw documents, in bounded memory, in parts that cores can share.

A source is a file, a folder, a glob, or `package:NAME/path`, a file of an installed Python package.
Kinds are known by their extension: .txt .jsonl .csv .parquet, each also with .gz or .zst behind it.
"""

from __future__ import annotations

import codecs
import csv
import difflib
import glob
import gzip
import io
import json
import os
import re
import shutil
import zlib
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any

import xxhash

from llmtrain.data.packages import PREFIX, package_root
from llmtrain.errors import DataError, Problem

KINDS = ("txt", "jsonl", "csv", "parquet")
COMPRESSIONS = ("gz", "zst")
# Fixed, because .txt documents of `auto` are packed anew at each border: a file's documents then
# depend on nothing but the file.
UNIT_BYTES = 16 << 20
BATCH_BYTES = 1 << 20
LONGEST_LINE = 256 << 20
AUTO_DOCUMENT_BYTES = 4096
_SAMPLE_PIECES, _SAMPLE_BYTES = 64, 1 << 16
_ALLOWED = "." + " .".join(KINDS) + ", each also with ." + " or .".join(COMPRESSIONS)

Batch = Sequence[str] | Sequence[bytes]


@dataclass(frozen=True)
class SourceFile:
    path: Path
    name: str
    """As the user would spell it; stands in messages."""
    kind: str
    compression: str
    size: int
    mtime_ns: int


@dataclass(frozen=True)
class Part:
    """A share of one file: bytes [start, stop) of a plain .txt or .jsonl, row groups of a .parquet,
    or the whole file (stop is None)."""

    file: SourceFile
    start: int = 0
    stop: int | None = None


Unit = tuple[Part, ...]


# ---------------------------------------------------------------------------------------------- find


def find_files(sources: Iterable[str], exclude: Path | None = None) -> tuple[list[SourceFile], list[str]]:
    """Every file of the sources in order, each once, and the names of files in folders left out for
    their extension. Files below `exclude` are no source.

    Raises DataError with a problem for each source that gives nothing.
    """
    problems: list[Problem] = []
    files: dict[Path, SourceFile] = {}
    skipped: list[str] = []
    excluded = exclude.resolve() if exclude is not None and exclude.is_dir() else None
    for source in sources:
        found = 0
        try:
            for path, name, explicit in _expand(source):
                resolved = path.resolve()
                if excluded is not None and resolved.is_relative_to(excluded):
                    continue
                kind, compression = _kind_of(path.name)
                if kind is None:
                    if explicit:
                        raise DataError(Problem(name, f"the extension {path.suffix or '(none)'}", _ALLOWED))
                    skipped.append(name)
                    continue
                found += 1
                if resolved not in files:
                    stat = path.stat()
                    files[resolved] = SourceFile(
                        resolved, name, kind, compression, stat.st_size, stat.st_mtime_ns
                    )
            if not found:
                raise DataError(Problem(source, "no file that can be read", _ALLOWED, "check the name"))
        except DataError as error:
            problems.extend(error.problems)
        except OSError as error:
            problems.append(Problem(str(error.filename or source), str(error.strerror), "a readable file"))
    if problems:
        raise DataError(problems)
    return list(files.values()), skipped


def _expand(source: str) -> Iterator[tuple[Path, str, bool]]:
    """(path, name for the user, whether the user asked for this very file)."""
    if source.startswith(PREFIX):
        root, inside = package_root(source)
        base = PREFIX + source.removeprefix(PREFIX).partition("/")[0]
        location = str(root / inside)
        named = lambda path: f"{base}/{path.relative_to(root).as_posix()}"  # noqa: E731
    else:
        location = os.path.expanduser(source)
        named = str
    path = Path(location)
    if path.is_dir():
        yield from ((p, named(p), False) for p in _walk(path))
    elif path.exists():
        yield path, named(path), True
    elif glob.has_magic(location):
        matches = sorted(glob.glob(location, recursive=True))
        if not matches:
            raise DataError(
                Problem(source, "a pattern that matches no file", "", "check the name and the folder")
            )
        for match in map(Path, matches):
            if match.is_dir():
                if "**" not in location:
                    yield from ((p, named(p), False) for p in _walk(match))
            else:
                yield match, named(match), "**" not in location
    else:
        siblings = [p.name for p in path.parent.iterdir()] if path.parent.is_dir() else []
        near = ", ".join(difflib.get_close_matches(path.name, siblings))
        raise DataError(
            Problem(
                source, "no such file or folder", f"in that folder: {near}" if near else "", "check the name"
            )
        )


def _walk(folder: Path) -> Iterator[Path]:
    for root, folders, names in os.walk(folder):
        folders[:] = sorted(name for name in folders if not name.startswith("."))
        yield from (Path(root, name) for name in sorted(names) if not name.startswith("."))


def _kind_of(name: str) -> tuple[str | None, str]:
    parts = name.lower().split(".")
    compression = parts.pop() if parts[-1] in COMPRESSIONS and len(parts) > 1 else ""
    kind = parts[-1] if len(parts) > 1 and parts[-1] in KINDS else None
    return kind, compression


def contents_fingerprint(files: Iterable[SourceFile]) -> str:
    """Hash of every file's name, size and contents, the contents of a file over 4 MiB in 64 even samples."""
    whole = xxhash.xxh3_128()
    for file in files:
        whole.update(f"{file.path.name}\0{file.size}\0".encode())
        with open(file.path, "rb") as stream:
            if file.size <= _SAMPLE_PIECES * _SAMPLE_BYTES:
                whole.update(stream.read())
                continue
            for piece in range(_SAMPLE_PIECES):
                stream.seek(piece * (file.size - _SAMPLE_BYTES) // (_SAMPLE_PIECES - 1))
                whole.update(stream.read(_SAMPLE_BYTES))
    return whole.hexdigest()


# ---------------------------------------------------------------------------------------------- plan


def plan_units(files: Iterable[SourceFile], txt_document: str) -> Iterator[Unit]:
    """Shares of about UNIT_BYTES in source order: large files are cut, small ones put together."""
    unit: list[Part] = []
    size = 0
    for part, part_size in _parts(files, txt_document):
        unit.append(part)
        size += part_size
        if size >= UNIT_BYTES:
            yield tuple(unit)
            unit, size = [], 0
    if unit:
        yield tuple(unit)


def _parts(files: Iterable[SourceFile], txt_document: str) -> Iterator[tuple[Part, int]]:
    for file in files:
        by_lines = file.kind == "jsonl" or (file.kind == "txt" and txt_document != "file")
        if file.size > UNIT_BYTES and by_lines and not file.compression:
            for start in range(0, file.size, UNIT_BYTES):
                stop = min(start + UNIT_BYTES, file.size)
                yield Part(file, start, stop), stop - start
        elif file.size > UNIT_BYTES and file.kind == "parquet" and not file.compression:
            yield from _row_group_parts(file)
        else:
            yield Part(file), file.size


def _row_group_parts(file: SourceFile) -> Iterator[tuple[Part, int]]:
    metadata = _open_parquet(file, file.path).metadata
    start, size = 0, 0
    for group in range(metadata.num_row_groups):
        size += metadata.row_group(group).total_byte_size
        if size >= UNIT_BYTES or group == metadata.num_row_groups - 1:
            yield Part(file, start, group + 1), size
            start, size = group + 1, 0


# ---------------------------------------------------------------------------------------------- read


def read_part(part: Part, text_field: str, txt_document: str, scratch: Path) -> Iterator[Batch]:
    """Raw documents of a part in order, in batches of about BATCH_BYTES. `scratch` takes a compressed
    parquet while it is read.

    Raises DataError that names file and place for anything that cannot be read, and
    UnicodeDecodeError, which `undecodable` turns into one.
    """
    file = part.file
    try:
        if file.kind == "parquet":
            yield from _read_parquet(part, text_field, scratch)
        elif file.kind == "csv":
            yield from _read_csv(file, text_field)
        elif file.kind == "jsonl":
            yield from _read_jsonl(part, text_field)
        elif txt_document == "file":
            yield from _read_whole(file)
        elif txt_document == "line":
            for _, data in _line_chunks(part):
                yield data.removesuffix(b"\n").split(b"\n")
        else:
            yield from _read_paragraphs(part, pack=txt_document == "auto")
    except (EOFError, zlib.error, gzip.BadGzipFile, _BadZstdError) as error:
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
        with _open(file) as stream:
            offset = 0
            while True:
                data = stream.read(BATCH_BYTES)
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


def _open(file: SourceFile) -> IO[bytes]:
    if file.compression == "gz":
        return io.BufferedReader(gzip.open(file.path, "rb"), BATCH_BYTES)  # type: ignore[arg-type]
    if file.compression == "zst":
        return io.BufferedReader(_ZstdStream(file.path), BATCH_BYTES)
    return open(file.path, "rb")


class _BadZstdError(Exception):
    pass


class _ZstdStream(io.RawIOBase):
    """Decompressed bytes of a .zst, of any number of frames; unlike zstandard's own reader it raises
    when the file ends inside a frame."""

    def __init__(self, path: Path) -> None:
        import zstandard

        self._zstandard = zstandard
        self._file = open(path, "rb")  # noqa: SIM115
        self._frame: Any = None
        self._output = memoryview(b"")

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: Any) -> int:
        while not self._output:
            data = self._frame.unused_data if self._frame is not None and self._frame.eof else b""
            if self._frame is None or self._frame.eof:
                data = data or self._file.read(1 << 14)
                if not data:
                    return 0
                self._frame = self._zstandard.ZstdDecompressor().decompressobj()
            else:
                data = self._file.read(1 << 14)
                if not data:
                    raise _BadZstdError("it ends inside a frame")
            try:
                self._output = memoryview(self._frame.decompress(data))
            except self._zstandard.ZstdError as error:
                raise _BadZstdError(str(error)) from error
        count = min(len(buffer), len(self._output))
        buffer[:count] = self._output[:count]
        self._output = self._output[count:]
        return count

    def close(self) -> None:
        self._file.close()
        super().close()


def _line_chunks(part: Part) -> Iterator[tuple[int, bytes]]:
    """(byte offset, whole lines of about BATCH_BYTES) of a part.

    A part begins at the first line that starts at or behind its start, and ends where the next part
    begins, so parts neither share nor miss a line.
    """
    with _open(part.file) as stream:
        offset = 0
        if part.start:
            offset = part.start - 1
            stream.seek(offset)
            offset += len(_read_line(stream, part.file))
        elif stream.peek(3)[:3] == codecs.BOM_UTF8:  # type: ignore[attr-defined]
            stream.read(3)
            offset = 3
        while part.stop is None or offset < part.stop:
            size = BATCH_BYTES if part.stop is None else min(BATCH_BYTES, part.stop - offset)
            data = stream.read(size)
            if not data:
                return
            if not data.endswith(b"\n"):
                data += _read_line(stream, part.file)
            yield offset, data
            offset += len(data)


def _read_line(stream: IO[bytes], file: SourceFile) -> bytes:
    line = stream.readline(LONGEST_LINE + 1)
    if len(line) > LONGEST_LINE:
        raise DataError(
            Problem(
                file.name,
                f"a line of more than {LONGEST_LINE >> 20} MiB",
                "shorter lines",
                "cut it into lines",
            )
        )
    return line


def _read_whole(file: SourceFile) -> Iterator[list[bytes]]:
    with _open(file) as stream:
        text = stream.read(LONGEST_LINE + 1)
    if len(text) > LONGEST_LINE:
        raise DataError(
            Problem(
                file.name,
                f"a file of more than {LONGEST_LINE >> 20} MiB as one document",
                "",
                "txt_document=auto",
            )
        )
    yield [text.removeprefix(codecs.BOM_UTF8)]


def _read_paragraphs(part: Part, pack: bool) -> Iterator[list[bytes]]:
    """Paragraphs as documents or, with `pack`, consecutive ones of AUTO_DOCUMENT_BYTES together; a
    paragraph of twice that is cut at a line end.

    Without `pack` no paragraph may be cut by a part's border: the part begins and ends behind the
    first blank line after the border.
    """
    file = part.file
    if pack:
        # A compressed file is read as one part; the same borders make its documents those of the plain file.
        lines = _marked_lines(part, UNIT_BYTES if part.stop is None else None)
    else:
        lines = _whole_paragraph_lines(part)
    documents: list[bytes] = []
    batch_size = 0
    document: list[bytes] = []
    size = 0
    for line in lines:
        blank = not line or line.isspace()
        if document or not blank:
            document.append(line)
            size += len(line)
        if not blank and size > LONGEST_LINE:
            raise DataError(
                Problem(
                    file.name, f"a paragraph of more than {LONGEST_LINE >> 20} MiB", "", "txt_document=auto"
                )
            )
        ends = not line or (
            (size >= AUTO_DOCUMENT_BYTES if blank else size >= 2 * AUTO_DOCUMENT_BYTES) if pack else blank
        )
        if ends and document:
            documents.append(b"".join(document))
            batch_size += size
            document, size = [], 0
        if batch_size >= BATCH_BYTES:
            yield documents
            documents, batch_size = [], 0
    if document:
        documents.append(b"".join(document))
    if documents:
        yield documents


def _marked_lines(part: Part, border: int | None) -> Iterator[bytes]:
    """Lines with their newline; an empty one at each multiple of `border`."""
    next_border = border
    for offset, data in _line_chunks(part):
        if next_border is None:
            yield from data.splitlines(keepends=True) if b"\r" not in data else _split_lines(data)
            continue
        for line in _split_lines(data):
            if offset >= next_border:
                yield b""
                next_border += -(-(offset - next_border + 1) // border) * border  # type: ignore[operator]
            yield line
            offset += len(line)


def _whole_paragraph_lines(part: Part) -> Iterator[bytes]:
    reading = part.start == 0
    for offset, data in _line_chunks(Part(part.file, part.start, part.file.size if part.stop else None)):
        for line in _split_lines(data):
            past_stop = part.stop is not None and offset >= part.stop
            if reading:
                yield line
                if past_stop and line.isspace():
                    return
            elif line.isspace():
                reading = True
                if past_stop:
                    return
            offset += len(line)


def _split_lines(data: bytes) -> list[bytes]:
    """Lines with their newline; bytes.splitlines would also cut at a lone carriage return."""
    lines = [line + b"\n" for line in data.split(b"\n")]
    last = lines.pop()[:-1]
    return [*lines, last] if last else lines


def _read_jsonl(part: Part, text_field: str) -> Iterator[list[str]]:
    file = part.file
    for offset, data in _line_chunks(part):
        lines = data.decode().split("\n")
        try:
            rows = [json.loads(line) for line in lines if line and not line.isspace()]
            texts = [row[text_field] for row in rows]
            if not all(type(text) is str for text in texts):
                texts = [_text_or_empty(text) for text in texts]
        except (ValueError, KeyError, TypeError, IndexError, RecursionError) as error:
            raise _jsonl_error(file, offset, lines, text_field) from error
        yield texts


def _text_or_empty(value: Any) -> str:
    if value is None:
        return ""
    if not isinstance(value, str):
        raise TypeError(type(value).__name__)
    return value


def _jsonl_error(file: SourceFile, offset: int, lines: list[str], text_field: str) -> DataError:
    before = 0
    with _open(file) as stream:
        remaining = offset
        while remaining and (data := stream.read(min(BATCH_BYTES, remaining))):
            before += data.count(b"\n")
            remaining -= len(data)
    for number, line in enumerate(lines, before + 1):
        if not line or line.isspace():
            continue
        where = f"{file.name} line {number}"
        try:
            row = json.loads(line)
        except (ValueError, RecursionError) as error:
            return DataError(Problem(where, f"no JSON ({error})", "one JSON object a line"))
        if not isinstance(row, dict):
            return DataError(Problem(where, f"a JSON {type(row).__name__}", "one JSON object a line"))
        if text_field not in row:
            return _missing_field(where, text_field, list(row))
        if not isinstance(row[text_field], str | None):
            got = f"field {text_field} that is a {type(row[text_field]).__name__}"
            return DataError(Problem(where, got, "text or null"))
    raise AssertionError(f"{file.name}: no faulty line found")


def _missing_field(where: str, text_field: str, fields: list[str]) -> DataError:
    return DataError(
        Problem(where, f"no field {text_field}", ", ".join(fields[:24]) or "(no fields)", "set text_field=…")
    )


def _read_csv(file: SourceFile, text_field: str) -> Iterator[list[bytes]]:
    import pyarrow
    import pyarrow.csv

    with _open(file) as stream, io.TextIOWrapper(stream, encoding="utf-8-sig", newline="") as text:
        csv.field_size_limit(LONGEST_LINE)
        try:
            header = next(csv.reader(text), None)
        except csv.Error as error:
            raise DataError(
                Problem(f"{file.name} header", f"no CSV ({error})", "names of the columns")
            ) from error
    if header is None:
        return
    if text_field not in header:
        raise _missing_field(f"{file.name} header", text_field, header)
    convert = pyarrow.csv.ConvertOptions(
        include_columns=[text_field], column_types={text_field: pyarrow.binary()}
    )
    parse = pyarrow.csv.ParseOptions(newlines_in_values=True)
    block_size, done = BATCH_BYTES, 0
    while True:
        read = pyarrow.csv.ReadOptions(use_threads=False, block_size=block_size)
        try:
            with _open(file) as stream:
                skip = done
                for batch in pyarrow.csv.open_csv(stream, read, parse, convert):
                    if skip:
                        taken = min(skip, batch.num_rows)
                        skip -= taken
                        batch = batch.slice(taken)
                    if batch.num_rows:
                        done += batch.num_rows
                        yield batch.column(0).to_pylist()
            return
        except pyarrow.ArrowInvalid as error:
            message = str(error)
            if ("straddl" in message or "Empty CSV file or block" in message) and block_size < LONGEST_LINE:
                # A row or the header is longer than the block: read on from there with a longer one.
                block_size *= 16
                continue
            raise DataError(
                Problem(file.name, message.splitlines()[0], "as many values in every row as in the header")
            ) from error


def _read_parquet(part: Part, text_field: str, scratch: Path) -> Iterator[Batch]:
    import pyarrow

    file, path, temporary = part.file, part.file.path, None
    if file.compression:
        # Parquet is read from its end, which a compressed stream does not offer.
        temporary = path = scratch / f"{os.getpid()}.parquet"
        with _open(file) as packed, open(path, "wb") as plain:
            shutil.copyfileobj(packed, plain, BATCH_BYTES)
    try:
        parquet = _open_parquet(file, path)
        if text_field not in parquet.schema_arrow.names:
            raise _missing_field(file.name, text_field, parquet.schema_arrow.names)
        kind = parquet.schema_arrow.field(text_field).type
        value = kind.value_type if pyarrow.types.is_dictionary(kind) else kind
        if not re.match(r"(large_)?(string|binary)(_view)?$|null$", str(value)):
            raise DataError(Problem(file.name, f"field {text_field} of type {kind}", "text"))
        groups = range(part.start, parquet.num_row_groups if part.stop is None else part.stop)
        for batch in parquet.iter_batches(
            512, row_groups=list(groups), columns=[text_field], use_threads=False
        ):
            values = batch.column(0).to_pylist()
            empty = b"" if any(isinstance(v, bytes) for v in values) else ""
            yield [empty if v is None else v for v in values]  # type: ignore[misc]
    except (pyarrow.ArrowInvalid, OSError) as error:
        if isinstance(error, OSError) and error.errno is not None:
            raise
        raise DataError(Problem(file.name, f"damaged parquet data ({str(error).splitlines()[0]})")) from error
    finally:
        if temporary is not None:
            temporary.unlink(missing_ok=True)


def _open_parquet(file: SourceFile, path: Path) -> Any:
    import pyarrow
    import pyarrow.parquet

    try:
        return pyarrow.parquet.ParquetFile(path, pre_buffer=False)
    except (pyarrow.ArrowInvalid, OSError) as error:
        if isinstance(error, OSError) and error.errno is not None:
            raise
        raise DataError(
            Problem(
                file.name, f"no parquet file ({str(error).splitlines()[0]})", "", "copy or download it again"
            )
        ) from error
