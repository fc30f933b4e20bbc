"""Find the source files, fix their order, and divide them into units of work.

A source is a file, a folder, a glob pattern, `package:NAME/path` (a file of an installed Python package), or
the URL of a file (http, https, s3 or any other protocol of fsspec).
The extension determines the kind: .txt .jsonl .csv .tsv .parquet .tar, each also followed by .gz or .zst.
A .json is read as JSON lines, as in public corpora. An uncompressed .json in a folder may hold settings
instead and is read only if a source names it.
"""

from __future__ import annotations

import difflib
import glob
import os
import stat
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path

import xxhash

from llmtrain.corpus.packages import PREFIX, package_root
from llmtrain.corpus.transport import is_remote
from llmtrain.errors import DataError, Problem
from llmtrain.files import expand_home
from llmtrain.prepare import remote, source_file
from llmtrain.prepare.decompress import read_errors
from llmtrain.prepare.folder_scan import FolderScan, SkippedFiles, printable_path, scan_problem, stat_or_none
from llmtrain.prepare.parquet import row_group_sizes
from llmtrain.prepare.source_file import COLUMNS, Part, SourceFile, Unit
from llmtrain.reading import open_regular
from llmtrain.urls import without_credentials

KINDS = ("txt", "jsonl", "csv", "tsv", "parquet", "tar")
COMPRESSIONS = ("gz", "zst")
_PIECE_BYTES = 64 << 20
_READERS = 16
_ALLOWED = (
    "."
    + " .".join(KINDS)
    + ", each also with ."
    + " or .".join(COMPRESSIONS)
    + "; .json of one object a line"
)


def find_files(
    sources: Iterable[str], exclude: Path | None = None, kinds: Mapping[str, str] | None = None
) -> tuple[list[SourceFile], SkippedFiles]:
    """Return all files of the sources in order, each once, and the skipped entries of folders.

    exclude: folder whose files are not sources. kinds: extension → kind of the files that are sources; "":
    the kind of files with any other extension that the user names; None: KINDS.
    Raise DataError with a problem for each source without a file and for everything unreadable.
    """
    problems: list[Problem] = []
    files: dict[Path | str, SourceFile] = {}
    skipped = SkippedFiles()
    excluded = exclude.resolve() if exclude is not None and exclude.is_dir() else None
    for source in sources:
        scan = FolderScan(skipped, excluded)
        found = 0
        try:
            if is_remote(source):
                kind, compression = _kind_of(remote.file_name(source), True, kinds)
                if kind is None:
                    allowed = _allowed(kinds)
                    raise DataError(Problem(without_credentials(source), "another extension", allowed))
                files.setdefault(source, remote.find(source, kind, compression))
                continue
            for path, name, explicit in _expand(source, scan):
                try:
                    file = _source_file(path, name, explicit, skipped, kinds)
                except OSError as error:
                    problems.append(scan_problem(error, path))
                    found += 1
                    continue
                if file is not None and not (excluded and file.path.is_relative_to(excluded)):
                    found += 1
                    files.setdefault(file.path, file)
            if not found and not scan.problems:
                got, allowed = "no readable file", _allowed(kinds)
                raise DataError(Problem(printable_path(source), got, allowed, "check the name"))
        except DataError as error:
            problems.extend(error.problems)
        except OSError as error:
            problems.append(scan_problem(error, source))
        problems.extend(scan.problems)
    if problems:
        raise DataError(dict.fromkeys(problems))
    return list(files.values()), skipped


def _source_file(
    path: Path, name: str, explicit: bool, skipped: SkippedFiles, kinds: Mapping[str, str] | None
) -> SourceFile | None:
    """Return the source file at `path`, or add it to `skipped` and return None.

    explicit: the user named this very file; raise DataError instead of skipping it.
    """
    status = os.stat(path)
    resolved = Path(os.path.realpath(path, strict=True))
    kind, compression = _kind_of(path.name, explicit, kinds)
    if kind is None:
        if explicit:
            extension = printable_path(path.suffix) or "(none)"
            raise DataError(Problem(name, f"the extension {extension}", _allowed(kinds)))
        skipped.other.append(name)
    elif not stat.S_ISREG(status.st_mode):
        if explicit:
            raise DataError(Problem(name, "a FIFO, socket or device", "a file", "write its data to a file"))
        skipped.special.append(name)
    else:
        return SourceFile(resolved, name, kind, compression, status.st_size, status.st_mtime_ns)
    return None


def find_line_pairs(sources: Sequence[str], targets: Sequence[str]) -> list[SourceFile]:
    """Return the files whose lines are the sources of pairs, each with its file of targets. Their extensions
    do not matter, except .gz and .zst.

    Raise DataError for anything but local files, or if there are not as many targets as sources.
    """
    problems: list[Problem] = []
    found: list[list[SourceFile]] = []
    for key, locations in (("source", sources), ("target_source", targets)):
        found.append([])
        for location in locations:
            path, name = expand_home(location), printable_path(location)
            try:
                status = None if is_remote(location) else stat_or_none(path)
            except OSError as error:
                problems.append(scan_problem(error, location))
                continue
            if status is None or not stat.S_ISREG(status.st_mode):
                got = f"{name}, which is not a local file"
                problems.append(Problem(key, got, "local files with target_source"))
                continue
            compression = _kind_of(path.name)[1]
            size, mtime_ns = status.st_size, status.st_mtime_ns
            found[-1].append(SourceFile(path.resolve(), name, "txt", compression, size, mtime_ns))
    if not problems and len(targets) != len(sources):
        allowed = f"{len(sources)}, one for each file of source"
        problems.append(Problem("target_source", f"{len(targets)} files", allowed))
    if problems:
        raise DataError(problems)
    return [replace(file, target=target) for file, target in zip(*found, strict=True)]


def check_fields(files: Iterable[SourceFile]) -> None:
    """Raise DataError for kinds of files without fields for the two texts of a pair."""
    without = [file for file in files if file.kind not in COLUMNS]
    if without:
        names = ", ".join(file.name for file in without[:3])
        allowed = "." + " .".join(COLUMNS) + ", which have fields for both sides of a pair"
        raise DataError(Problem("source", names, allowed, "or give two files of lines: target_source=…"))


def _expand(source: str, scan: FolderScan) -> Iterator[tuple[Path, str, bool]]:
    """Yield (path, name for messages, whether the user named this very file) for each file of a source."""
    if source.startswith(PREFIX):
        root, inside = package_root(source)
        base = PREFIX + source.removeprefix(PREFIX).partition("/")[0]
        location = str(root / inside)
        named = lambda path: f"{base}/{path.relative_to(root).as_posix()}"  # noqa: E731
    else:
        location = os.path.expanduser(source)
        named = printable_path
    path = Path(location)
    status = stat_or_none(path)
    if status is not None:
        if stat.S_ISDIR(status.st_mode):
            yield from ((file, named(file), False) for file in scan.files(path))
        else:
            yield path, named(path), True
    elif glob.has_magic(location):
        matches = scan.matches(location)
        if not matches and not scan.problems:
            raise DataError(
                Problem(printable_path(source), "a pattern that matches no file", "", "check name and folder")
            )
        # A pattern with ** matches every folder and so does not name the files in them.
        explicit = "**" not in location
        for match in matches:
            if match.is_dir():
                yield from ((file, named(file), False) for file in scan.files(match))
            else:
                yield match, named(match), explicit or location.endswith(".json")
    else:
        siblings = [p.name for p in path.parent.iterdir()] if path.parent.is_dir() else []
        similar = ", ".join(map(printable_path, difflib.get_close_matches(path.name, siblings)))
        allowed = f"in that folder: {similar}" if similar else ""
        raise DataError(Problem(printable_path(source), "no such file or folder", allowed, "check the name"))


def _kind_of(
    name: str, named: bool = False, kinds: Mapping[str, str] | None = None
) -> tuple[str | None, str]:
    """Return kind (None if unsupported) and compression of a file by its name. named: the user named the
    file; kinds: see find_files."""
    parts = name.lower().split(".")
    compression = parts.pop() if parts[-1] in COMPRESSIONS and len(parts) > 1 else ""
    kind = parts[-1] if len(parts) > 1 else None
    if kinds is not None:
        return kinds.get(kind or "", kinds.get("") if named else None), compression
    if kind == "json" and (named or compression):
        kind = "jsonl"
    return kind if kind in KINDS else None, compression


def _allowed(kinds: Mapping[str, str] | None) -> str:
    """Return the extensions of sources, for messages."""
    if kinds is None:
        return _ALLOWED
    return "." + " .".join(extension for extension in kinds if extension) + ", each also with .gz or .zst"


def contents_fingerprint(
    files: Sequence[SourceFile], on_piece: Callable[[int], None] = lambda _: None
) -> str:
    """Return a hash of names, sizes and contents of the files. Size and times alone do not reveal every edit.

    on_piece: called with the number of bytes of each hashed piece.
    """
    whole = xxhash.xxh3_128()
    pieces = [(file, start) for file in files for start in range(0, max(file.size, 1), _PIECE_BYTES)]
    # Network file systems serve many requests at once.
    with ThreadPoolExecutor(_READERS) as readers:
        for (file, start), digest in zip(pieces, readers.map(_piece_digest, pieces), strict=True):
            if not start:
                whole.update(os.fsencode(file.path.name) + f"\0{file.size}\0".encode())
            whole.update(digest)
            on_piece(min(file.size - start, _PIECE_BYTES))
    return whole.hexdigest()


def _piece_digest(piece: tuple[SourceFile, int]) -> bytes:
    file, start = piece
    if file.url:
        return file.version.encode() if not start else b""
    digest = xxhash.xxh3_128()
    with read_errors(file), open(file.path, "rb", buffering=0, opener=open_regular) as stream:
        stream.seek(start)
        left = _PIECE_BYTES
        while left and (data := stream.read(min(left, source_file.BATCH_BYTES))):
            digest.update(data)
            left -= len(data)
    return digest.digest()


# ---------------------------------------------------------------------------------------------- plan


def plan_units(files: Iterable[SourceFile], txt_document: str) -> Iterator[Unit]:
    """Yield units of about UNIT_BYTES in source order: large files are split, small files are combined."""
    unit: list[Part] = []
    size = 0
    for part, part_size in _parts(files, txt_document):
        unit.append(part)
        size += part_size
        if size >= source_file.UNIT_BYTES:
            yield tuple(unit)
            unit, size = [], 0
    if unit:
        yield tuple(unit)


def _parts(files: Iterable[SourceFile], txt_document: str) -> Iterator[tuple[Part, int]]:
    for file in files:
        if file.target is not None:
            # The lines of the two files start at different offsets: one reader takes both files whole.
            yield Part(file), file.size + file.target.size
            continue
        by_lines = file.kind == "jsonl" or (file.kind == "txt" and txt_document != "file")
        if file.url:
            yield Part(file), file.size
        elif file.size > source_file.UNIT_BYTES and by_lines and not file.compression:
            for start in range(0, file.size, source_file.UNIT_BYTES):
                stop = min(start + source_file.UNIT_BYTES, file.size)
                yield Part(file, start, stop), stop - start
        elif file.size > source_file.UNIT_BYTES and file.kind == "parquet" and not file.compression:
            yield from _row_group_parts(file)
        else:
            yield Part(file), file.size


def _row_group_parts(file: SourceFile) -> Iterator[tuple[Part, int]]:
    sizes = row_group_sizes(file)
    start, size = 0, 0
    for group, group_size in enumerate(sizes):
        size += group_size
        if size >= source_file.UNIT_BYTES or group == len(sizes) - 1:
            yield Part(file, start, group + 1), size
            start, size = group + 1, 0
