"""Scan folders and glob patterns for source files, and record what is skipped.

Symbolic links to folders are followed, each folder is entered once, and anything unreadable is reported as a
problem: nothing is skipped silently.
"""

from __future__ import annotations

import fnmatch
import glob
import os
import stat
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from llmtrain.errors import Problem, printable

_SHOWN = 8
_LONGEST_SHOWN = 200
"""Maximum length of a printed name that comes from the contents of a file, where it may have any length."""


def printable_path(name: str | Path) -> str:
    """Return a file name as printable text, with invalid UTF-8 and terminal control characters escaped."""
    return printable(os.fsencode(name).decode("utf-8", "backslashreplace"))


def short_name(name: str) -> str:
    """Return a name from the contents of a file as printable text, truncated to 200 characters."""
    cut = name if len(name) <= _LONGEST_SHOWN else name[:_LONGEST_SHOWN] + "…"
    return printable(cut).encode("utf-8", "surrogateescape").decode("utf-8", "backslashreplace")


def stat_or_none(path: Path) -> os.stat_result | None:
    """Return os.stat of `path`, None if nothing is there. Raise OSError for a broken link and other
    errors."""
    try:
        return os.stat(path)
    except (FileNotFoundError, NotADirectoryError):
        if os.path.islink(path):
            raise
        return None


def scan_problem(error: OSError, source: str | Path) -> Problem:
    """Return the problem of a source that could not be read."""
    location, reason = error.filename or source, error.strerror or str(error)
    got = f"a broken link ({reason})" if os.path.islink(location) else reason
    remedy = "correct it, or name the sources one by one"
    return Problem(printable_path(location), got, "a readable file or folder", remedy)


@dataclass
class SkippedFiles:
    """Names of the entries in source folders that are not read."""

    other: list[str] = field(default_factory=list)
    """Files with unsupported extensions."""
    hidden: list[str] = field(default_factory=list)
    """Files and folders whose name begins with a dot, and lost+found."""
    special: list[str] = field(default_factory=list)
    """FIFOs, sockets and devices."""
    cycles: list[str] = field(default_factory=list)
    """Links to a folder that contains them."""

    def notes(self) -> list[str]:
        """Return one note for each kind that occurs."""
        endings = sorted({Path(name).suffix or "none" for name in self.other})
        kinds = (
            (self.other, "files of other extensions", endings),
            (self.hidden, "hidden files and folders", self.hidden),
            (self.special, "FIFOs, sockets and devices", self.special),
            (self.cycles, "links to a folder that contains them", self.cycles),
        )
        return [
            # A pattern may visit a folder twice.
            f"{len(set(names)):,} {what} left out: {', '.join([*dict.fromkeys(told)][:_SHOWN])}"
            for names, what, told in kinds
            if names
        ]


class FolderScan:
    """A scan of the folders of one source; `problems` collects what could not be read."""

    def __init__(self, skipped: SkippedFiles, excluded: Path | None = None) -> None:
        self.problems: list[Problem] = []
        self._skipped, self._excluded = skipped, excluded
        self._entered: set[str] = set()

    def files(self, top: Path) -> Iterator[Path]:
        """Yield all files below a folder, its own sorted by name first, then those of each subfolder."""
        for _, files in self._folders(top, self._entered):
            yield from files

    def matches(self, pattern: str) -> list[Path]:
        """Return the files and folders that match a shell pattern, sorted. `**` matches any number of
        folders."""
        parts = Path(pattern).parts
        plain = next(number for number, part in enumerate(parts) if glob.has_magic(part))
        return sorted(set(self._matches(Path(*parts[:plain]), parts[plain:])), key=os.fsencode)

    def _matches(self, place: Path, parts: Sequence[str]) -> Iterator[Path]:
        try:
            status = stat_or_none(place)
        except OSError as error:
            self.problems.append(scan_problem(error, place))
            return
        if status is None:
            return
        if not parts or parts == ("**",):
            yield place
        elif stat.S_ISDIR(status.st_mode):
            first, rest = parts[0], parts[1:]
            if first == "**":
                for folder, _ in list(self._folders(place, set())):
                    yield from self._matches(folder, rest)
            elif not glob.has_magic(first):
                yield from self._matches(place / first, rest)
            else:
                for entry in self._entries(place):
                    hidden = entry.name.startswith(".") and not first.startswith(".")
                    if not hidden and fnmatch.fnmatchcase(entry.name, first):
                        yield from self._matches(place / entry.name, rest)

    def _folders(self, top: Path, entered: set[str]) -> Iterator[tuple[Path, list[Path]]]:
        """Yield each folder at or below `top` that is not in `entered` yet, with the files in it."""
        waiting = [(top, os.path.realpath(top))]
        while waiting:
            folder, real = waiting.pop()
            if real in entered or Path(real) == self._excluded:
                continue
            entered.add(real)
            files, folders = [], []
            for entry in self._entries(folder):
                path = folder / entry.name
                if entry.name.startswith(".") or entry.name == "lost+found":
                    self._skipped.hidden.append(printable_path(path))
                elif not _is_folder(entry):
                    files.append(path)
                elif not entry.is_symlink():
                    folders.append((path, os.path.join(real, entry.name)))
                elif Path(real).is_relative_to(target := os.path.realpath(path)):
                    self._skipped.cycles.append(printable_path(path))
                else:
                    folders.append((path, target))
            yield folder, files
            waiting += reversed(folders)

    def _entries(self, folder: Path) -> list[os.DirEntry[str]]:
        """Return the entries of a folder, sorted by name."""
        try:
            with os.scandir(folder) as entries:
                return sorted(entries, key=lambda entry: entry.name)
        except OSError as error:
            self.problems.append(scan_problem(error, folder))
            return []


def _is_folder(entry: os.DirEntry[str]) -> bool:
    try:
        return entry.is_dir()
    except OSError:
        # The error is reported later, when the entry is opened as a file.
        return False
