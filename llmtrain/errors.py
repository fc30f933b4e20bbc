"""Errors that a user can cause. Each states in one line what was got, what is allowed and what to do.

The command line prints them without a traceback and exits with code 2. Any other exception is a defect of
llmtrain and keeps its traceback.
"""

from __future__ import annotations

import difflib
from collections.abc import Iterable
from dataclasses import dataclass, replace

from llmtrain.urls import without_credentials

EXIT_CODE = 2
INTERRUPTED_EXIT_CODE = 75
"""Exit code of a run that stopped on request before its end, under every launcher; the same command resumes
it (EX_TEMPFAIL of sysexits)."""

WATCH_EXIT_CODE = 76
"""Exit code of a rank of a job that its watch ended, because no rank made progress or collectives differed; a
launcher may start it again."""

FEW = 8
"""Up to this many known names are always listed in a message."""
MANY = 40
"""Up to this many known names are listed if none is similar."""
LONGEST_PART = 1000
"""Maximum characters of a part of a problem, which may contain a name or value from a foreign file."""


@dataclass(frozen=True)
class Problem:
    """One problem in the user's input, printed as `where: got …; allowed: …; remedy`."""

    where: str
    """Config key, file or other location of the problem."""
    got: str
    """Value or state that was found."""
    allowed: str = ""
    """Values that are allowed there."""
    remedy: str = ""
    """Recommended action, in the imperative."""

    def within(self, prefix: str) -> Problem:
        """Return the problem with its key prefixed by `prefix`."""
        return replace(self, where=f"{prefix}.{self.where}") if prefix else self

    def of_file(self, file: str, section: str) -> Problem:
        """Return the problem with its key as one in a section of a file."""
        return replace(self, where=f"{file}: {section}.{self.where.removeprefix(f'{section}.')}")

    def __str__(self) -> str:
        parts = [f"{self.where}: got {self.got}"]
        if self.allowed:
            parts.append(f"allowed: {self.allowed}")
        if self.remedy:
            parts.append(self.remedy)
        shown = (without_credentials(" ".join(part.split())) for part in parts)
        return "; ".join(printable(_clipped(part)) for part in shown)


class UserError(Exception):
    """An error outside the program. Carries all problems found, each printed as one line."""

    everywhere: bool | None = None
    """Whether all ranks raise the same error, so that only one of them prints it; None: unknown."""

    def __init__(self, problems: Problem | Iterable[Problem]) -> None:
        self.problems: tuple[Problem, ...] = (problems,) if isinstance(problems, Problem) else tuple(problems)
        super().__init__(self.problems)

    def __str__(self) -> str:
        return "\n".join(map(str, self.problems))


class ConfigError(UserError):
    """An invalid key, value or combination of values."""


class LaunchError(UserError):
    """Missing ranks, or ranks that were started with different settings."""


class DataError(UserError):
    """An unusable source, corpus, tar file or tokenizer."""


class CheckpointError(UserError):
    """An unusable checkpoint or run folder."""


class TrainingError(UserError):
    """Training cannot continue: a loss that is not finite, a full disk."""


def printable(text: str) -> str:
    """Return `text` with control and invisible characters as backslash escapes, since names in foreign files
    may contain anything. Invalid UTF-8 stays as Python's surrogate escapes."""
    if text.isprintable():
        return text
    return "".join(
        character if character.isprintable() or "\udca0" <= character <= "\udcff" else _escaped(character)
        for character in text
    )


def _clipped(part: str) -> str:
    return part if len(part) <= LONGEST_PART else f"{part[:LONGEST_PART]}…"


def _escaped(character: str) -> str:
    return character.encode("unicode_escape").decode()


def nearest(name: str, known: Iterable[str], limit: int = 3) -> str:
    """Return the known names that are most similar to `name`, for a message; also the others if there are
    few."""
    names = list(dict.fromkeys(known))
    close = difflib.get_close_matches(name, names, n=limit, cutoff=0.5)
    if len(names) <= FEW:
        close += [other for other in names if other not in close]
    elif not close and len(names) <= MANY:
        close = sorted(names)
    elif not close:
        close = difflib.get_close_matches(name, names, n=limit, cutoff=0.0)
    return ", ".join(close)
