"""What stands in folders and matches patterns, and what of it is no source.

Linked folders are followed, each folder is entered once, and what cannot be looked at is a problem: nothing
is left out without a word.
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
"""Characters of a name from within a file: there it may be as long as the file."""


def shown(name: str | Path) -> str:
    """A file's name as text: bytes that are no UTF-8, and what would steer a terminal, as escapes."""
    return printable(os.fsencode(name).decode("utf-8", "backslashreplace"))


def brief(name: str) -> str:
    """A name from within a file as text, cut where it is long."""
    cut = name if len(name) <= _LONGEST_SHOWN else name[:_LONGEST_SHOWN] + "…"
    return printable(cut).encode("utf-8", "surrogateescape").decode("utf-8", "backslashreplace")


def look(path: Path) -> os.stat_result | None:
    """What stands there; None for nothing. Raise OSError for a link that leads nowhere, and all else."""
    try:
        return os.stat(path)
    except (FileNotFoundError, NotADirectoryError):
        if os.path.islink(path):
            raise
        return None


def scan_problem(error: OSError, source: str | Path) -> Problem:
    """Why a source could not be looked at."""
    place, reason = error.filename or source, error.strerror or str(error)
    got = f"a link that leads nowhere ({reason})" if os.path.islink(place) else reason
    return Problem(shown(place), got, "a file or folder that can be read", "or name what is to be read")


@dataclass
class LeftOut:
    """Names of what stands in the folders of the sources and is not read."""

    other: list[str] = field(default_factory=list)
    """Files of other extensions."""
    hidden: list[str] = field(default_factory=list)
    """Files and folders with a dot before their name, and the file system's own lost+found."""
    special: list[str] = field(default_factory=list)
    """FIFOs, sockets, devices."""
    cycles: list[str] = field(default_factory=list)
    """Links to a folder in which they stand themselves."""

    def notes(self) -> list[str]:
        """One for each kind that occurs."""
        endings = sorted({Path(name).suffix or "none" for name in self.other})
        kinds = (
            (self.other, "files of other extensions", endings),
            (self.hidden, "hidden files and folders", self.hidden),
            (self.special, "FIFOs, sockets and devices", self.special),
            (self.cycles, "links to a folder in which they stand", self.cycles),
        )
        return [
            # A pattern may pass a folder twice.
            f"{len(set(names)):,} {what} left out: {', '.join([*dict.fromkeys(told)][:_SHOWN])}"
            for names, what, told in kinds
            if names
        ]


class Scan:
    """One look at the folders of a source. `problems` are those that could not be read."""

    def __init__(self, left_out: LeftOut, excluded: Path | None = None) -> None:
        self.problems: list[Problem] = []
        self._left_out, self._excluded = left_out, excluded
        self._entered: set[str] = set()

    def files(self, top: Path) -> Iterator[Path]:
        """Every file below a folder: its own by name, then those of its folders in turn."""
        for _, files in self._folders(top, self._entered):
            yield from files

    def matches(self, pattern: str) -> list[Path]:
        """Files and folders that match a pattern as the shell's, `**` being any folders; sorted."""
        parts = Path(pattern).parts
        plain = next(number for number, part in enumerate(parts) if glob.has_magic(part))
        return sorted(set(self._matches(Path(*parts[:plain]), parts[plain:])), key=os.fsencode)

    def _matches(self, place: Path, parts: Sequence[str]) -> Iterator[Path]:
        try:
            status = look(place)
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
        """Every folder at and below `top` that was not `entered` before, and the files that stand in it."""
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
                    self._left_out.hidden.append(shown(path))
                elif not _is_folder(entry):
                    files.append(path)
                elif not entry.is_symlink():
                    folders.append((path, os.path.join(real, entry.name)))
                elif Path(real).is_relative_to(target := os.path.realpath(path)):
                    self._left_out.cycles.append(shown(path))
                else:
                    folders.append((path, target))
            yield folder, files
            waiting += reversed(folders)

    def _entries(self, folder: Path) -> list[os.DirEntry[str]]:
        """By name."""
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
        # What it is instead is told when its file is looked at.
        return False
