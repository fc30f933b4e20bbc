"""Which files are read, in which order, in which shares.

A source is a file, a folder, a glob, `package:NAME/path` (a file of an installed Python package), or the
URL of a file (http, https, s3 and what else fsspec knows).
Kinds are known by their extension: .txt .jsonl .csv .tsv .parquet .tar, each also with .gz or .zst behind it.
A .json is JSON lines, as in public corpora. Plain ones in a folder may as well be settings: they are read
where the source names them.
"""

from __future__ import annotations

import difflib
import glob
import os
import stat
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path

import xxhash

from llmtrain.corpus.packages import PREFIX, package_root
from llmtrain.corpus.transport import is_remote
from llmtrain.errors import DataError, Problem
from llmtrain.files import at_home
from llmtrain.prepare import remote, streams
from llmtrain.prepare.opening import reading
from llmtrain.prepare.parquet import row_group_sizes
from llmtrain.prepare.scan import LeftOut, Scan, look, scan_problem, shown
from llmtrain.prepare.streams import COLUMNS, Part, SourceFile, Unit
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


def find_files(sources: Iterable[str], exclude: Path | None = None) -> tuple[list[SourceFile], LeftOut]:
    """Every file of the sources in order, each once, and what stands in folders and is left out. Files
    below `exclude` are no source.

    Raise DataError with a problem for each source that gives nothing, and for whatever cannot be looked at.
    """
    problems: list[Problem] = []
    files: dict[Path | str, SourceFile] = {}
    left_out = LeftOut()
    excluded = exclude.resolve() if exclude is not None and exclude.is_dir() else None
    for source in sources:
        scan = Scan(left_out, excluded)
        found = 0
        try:
            if is_remote(source):
                kind, compression = _kind_of(remote.file_name(source))
                if kind is None:
                    raise DataError(Problem(without_credentials(source), "another extension", _ALLOWED))
                files.setdefault(source, remote.find(source, kind, compression))
                continue
            for path, name, explicit in _expand(source, scan):
                try:
                    file = _source_file(path, name, explicit, left_out)
                except OSError as error:
                    problems.append(scan_problem(error, path))
                    found += 1
                    continue
                if file is not None and not (excluded and file.path.is_relative_to(excluded)):
                    found += 1
                    files.setdefault(file.path, file)
            if not found and not scan.problems:
                raise DataError(
                    Problem(shown(source), "no file that can be read", _ALLOWED, "check the name")
                )
        except DataError as error:
            problems.extend(error.problems)
        except OSError as error:
            problems.append(scan_problem(error, source))
        problems.extend(scan.problems)
    if problems:
        raise DataError(dict.fromkeys(problems))
    return list(files.values()), left_out


def _source_file(path: Path, name: str, explicit: bool, left_out: LeftOut) -> SourceFile | None:
    """The file of that path, or None after adding it to `left_out`; `explicit`: the user names it."""
    status = os.stat(path)
    resolved = Path(os.path.realpath(path, strict=True))
    kind, compression = _kind_of(path.name, explicit)
    if kind is None:
        if explicit:
            raise DataError(Problem(name, f"the extension {shown(path.suffix) or '(none)'}", _ALLOWED))
        left_out.other.append(name)
    elif not stat.S_ISREG(status.st_mode):
        if explicit:
            raise DataError(Problem(name, "a FIFO, socket or device", "a file", "write what it gives to one"))
        left_out.special.append(name)
    else:
        return SourceFile(resolved, name, kind, compression, status.st_size, status.st_mtime_ns)
    return None


def find_line_pairs(sources: Sequence[str], targets: Sequence[str]) -> list[SourceFile]:
    """Files whose lines are the sources of pairs, each with the one of their targets, whatever their
    extensions but .gz and .zst.

    Raise DataError for what is no file of this machine, and for other numbers of files.
    """
    problems: list[Problem] = []
    found: list[list[SourceFile]] = []
    for key, places in (("source", sources), ("target_source", targets)):
        found.append([])
        for place in places:
            path = at_home(place)
            try:
                status = None if is_remote(place) else look(path)
            except OSError as error:
                problems.append(scan_problem(error, place))
                continue
            if status is None or not stat.S_ISREG(status.st_mode):
                got = f"{shown(place)}, no file of this machine"
                problems.append(Problem(key, got, "a file with target_source"))
                continue
            compression = _kind_of(path.name)[1]
            found[-1].append(
                SourceFile(
                    path.resolve(), shown(place), "txt", compression, status.st_size, status.st_mtime_ns
                )
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


def _expand(source: str, scan: Scan) -> Iterator[tuple[Path, str, bool]]:
    """(path, name for the user, whether the user asked for this very file)."""
    if source.startswith(PREFIX):
        root, inside = package_root(source)
        base = PREFIX + source.removeprefix(PREFIX).partition("/")[0]
        location = str(root / inside)
        named = lambda path: f"{base}/{path.relative_to(root).as_posix()}"  # noqa: E731
    else:
        location = os.path.expanduser(source)
        named = shown
    path = Path(location)
    status = look(path)
    if status is not None:
        if stat.S_ISDIR(status.st_mode):
            yield from ((file, named(file), False) for file in scan.files(path))
        else:
            yield path, named(path), True
    elif glob.has_magic(location):
        matches = scan.matches(location)
        if not matches and not scan.problems:
            raise DataError(
                Problem(shown(source), "a pattern that matches no file", "", "check the name and the folder")
            )
        # Every folder matches such a pattern; what is in them is not asked for by name.
        explicit = "**" not in location
        for match in matches:
            if match.is_dir():
                yield from ((file, named(file), False) for file in scan.files(match))
            else:
                yield match, named(match), explicit or location.endswith(".json")
    else:
        siblings = [p.name for p in path.parent.iterdir()] if path.parent.is_dir() else []
        near = ", ".join(map(shown, difflib.get_close_matches(path.name, siblings)))
        allowed = f"in that folder: {near}" if near else ""
        raise DataError(Problem(shown(source), "no such file or folder", allowed, "check the name"))


def _kind_of(name: str, named: bool = False) -> tuple[str | None, str]:
    """Kind and compression of a file by its name; `named`: the user asks for this very one."""
    parts = name.lower().split(".")
    compression = parts.pop() if parts[-1] in COMPRESSIONS and len(parts) > 1 else ""
    kind = parts[-1] if len(parts) > 1 else None
    if kind == "json" and (named or compression):
        kind = "jsonl"
    return kind if kind in KINDS else None, compression


def contents_fingerprint(
    files: Sequence[SourceFile], on_piece: Callable[[int], None] = lambda _: None
) -> str:
    """Hash of every file's name, size and contents. Nothing less tells an edited file from what it was:
    size and times can all be the same. `on_piece` is told the bytes that were hashed."""
    whole = xxhash.xxh3_128()
    pieces = [(file, start) for file in files for start in range(0, max(file.size, 1), _PIECE_BYTES)]
    # A shared disk answers many at once.
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
    with reading(file), open(file.path, "rb", buffering=0, opener=open_regular) as stream:
        stream.seek(start)
        left = _PIECE_BYTES
        while left and (data := stream.read(min(left, streams.BATCH_BYTES))):
            digest.update(data)
            left -= len(data)
    return digest.digest()


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
    sizes = row_group_sizes(file)
    start, size = 0, 0
    for group, group_size in enumerate(sizes):
        size += group_size
        if size >= streams.UNIT_BYTES or group == len(sizes) - 1:
            yield Part(file, start, group + 1), size
            start, size = group + 1, 0
