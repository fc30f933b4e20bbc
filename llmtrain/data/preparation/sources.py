"""Which files are read, in which order, in which shares.

A source is a file, a folder, a glob, `package:NAME/path` (a file of an installed Python package), or the
URL of a file (http, https, s3 and what else fsspec knows).
Kinds are known by their extension: .txt .jsonl .csv .tsv .parquet .tar, each also with .gz or .zst behind it.
"""

from __future__ import annotations

import difflib
import glob
import os
from collections.abc import Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path

import xxhash

from llmtrain.data.packages import PREFIX, package_root
from llmtrain.data.preparation import remote, streams
from llmtrain.data.preparation.streams import COLUMNS, Part, SourceFile, Unit
from llmtrain.data.preparation.tables import open_parquet
from llmtrain.data.transport import is_remote, without_credentials
from llmtrain.errors import DataError, Problem

KINDS = ("txt", "jsonl", "csv", "tsv", "parquet", "tar")
COMPRESSIONS = ("gz", "zst")
_SAMPLE_PIECES, _SAMPLE_BYTES = 64, 1 << 16
_READERS = 16
_ALLOWED = "." + " .".join(KINDS) + ", each also with ." + " or .".join(COMPRESSIONS)


def find_files(sources: Iterable[str], exclude: Path | None = None) -> tuple[list[SourceFile], list[str]]:
    """Every file of the sources in order, each once, and the names of files in folders left out for
    their extension. Files below `exclude` are no source.

    Raises DataError with a problem for each source that gives nothing.
    """
    problems: list[Problem] = []
    files: dict[Path | str, SourceFile] = {}
    skipped: list[str] = []
    excluded = exclude.resolve() if exclude is not None and exclude.is_dir() else None
    for source in sources:
        found = 0
        try:
            if is_remote(source):
                kind, compression = _kind_of(remote.file_name(source))
                if kind is None:
                    raise DataError(Problem(without_credentials(source), "another extension", _ALLOWED))
                files.setdefault(source, remote.find(source, kind, compression))
                continue
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


def find_line_pairs(sources: Sequence[str], targets: Sequence[str]) -> list[SourceFile]:
    """Files whose lines are the sources of pairs, each with the one of their targets, whatever their
    extensions but .gz and .zst.

    Raises DataError for what is no file of this machine, and for other numbers of files.
    """
    problems: list[Problem] = []
    found: list[list[SourceFile]] = []
    for key, places in (("source", sources), ("target_source", targets)):
        found.append([])
        for place in places:
            path = Path(place).expanduser()
            try:
                if is_remote(place) or not path.is_file():
                    raise DataError(
                        Problem(key, f"{place}, no file of this machine", "a file with target_source")
                    )
                stat = path.stat()
            except DataError as error:
                problems.extend(error.problems)
                continue
            compression = _kind_of(path.name)[1]
            found[-1].append(
                SourceFile(path.resolve(), place, "txt", compression, stat.st_size, stat.st_mtime_ns)
            )
    if not problems and len(targets) != len(sources):
        allowed = f"{len(sources)}, one for each of source"
        problems.append(Problem("target_source", f"{len(targets)} files", allowed))
    if problems:
        raise DataError(problems)
    return [replace(file, target=target) for file, target in zip(*found, strict=True)]


def check_fields(files: Iterable[SourceFile]) -> None:
    """Raise DataError for files that have no fields for the two sides of pairs."""
    without = [file for file in files if file.kind not in COLUMNS]
    if without:
        names = ", ".join(file.name for file in without[:3])
        allowed = "." + " .".join(COLUMNS) + ", which have fields for both sides of a pair"
        raise DataError(Problem("source", names, allowed, "or give two files of lines: target_source=…"))


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


def contents_fingerprint(files: Sequence[SourceFile]) -> str:
    """Hash of every file's name, size and contents, the contents of a file over 4 MiB in 64 even samples."""
    whole = xxhash.xxh3_128()
    # A shared disk answers many at once.
    with ThreadPoolExecutor(_READERS) as readers:
        for file, digest in zip(files, readers.map(_contents_digest, files), strict=True):
            whole.update(f"{file.path.name}\0{file.size}\0{digest}\0".encode())
    return whole.hexdigest()


def _contents_digest(file: SourceFile) -> str:
    if file.url:
        return file.version
    digest = xxhash.xxh3_128()
    with open(file.path, "rb") as stream:
        if file.size <= _SAMPLE_PIECES * _SAMPLE_BYTES:
            digest.update(stream.read())
        else:
            for piece in range(_SAMPLE_PIECES):
                stream.seek(piece * (file.size - _SAMPLE_BYTES) // (_SAMPLE_PIECES - 1))
                digest.update(stream.read(_SAMPLE_BYTES))
    return digest.hexdigest()


# ---------------------------------------------------------------------------------------------- plan


def plan_units(files: Iterable[SourceFile], txt_document: str) -> Iterator[Unit]:
    """Shares of about streams.UNIT_BYTES in source order: large files are cut, small ones put together."""
    unit: list[Part] = []
    size = 0
    for part, part_size in _parts(files, txt_document):
        unit.append(part)
        size += part_size
        if size >= streams.UNIT_BYTES:
            yield tuple(unit)
            unit, size = [], 0
    if unit:
        yield tuple(unit)


def _parts(files: Iterable[SourceFile], txt_document: str) -> Iterator[tuple[Part, int]]:
    for file in files:
        if file.target is not None:
            # Line borders of two files are where they are: one reader takes both whole.
            yield Part(file), file.size + file.target.size
            continue
        by_lines = file.kind == "jsonl" or (file.kind == "txt" and txt_document != "file")
        if file.url:
            yield Part(file), file.size
        elif file.size > streams.UNIT_BYTES and by_lines and not file.compression:
            for start in range(0, file.size, streams.UNIT_BYTES):
                stop = min(start + streams.UNIT_BYTES, file.size)
                yield Part(file, start, stop), stop - start
        elif file.size > streams.UNIT_BYTES and file.kind == "parquet" and not file.compression:
            yield from _row_group_parts(file)
        else:
            yield Part(file), file.size


def _row_group_parts(file: SourceFile) -> Iterator[tuple[Part, int]]:
    metadata = open_parquet(file, file.path).metadata
    start, size = 0, 0
    for group in range(metadata.num_row_groups):
        size += metadata.row_group(group).total_byte_size
        if size >= streams.UNIT_BYTES or group == metadata.num_row_groups - 1:
            yield Part(file, start, group + 1), size
            start, size = group + 1, 0
