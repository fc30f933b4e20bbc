"""Errors a user can cause: each says what was got, what is allowed and what to do, in one line.

The command line prints them without a traceback and exits with code 2. Everything else that is
raised is a defect of llmtrain and keeps its traceback.
"""

from __future__ import annotations

import difflib
from collections.abc import Iterable
from dataclasses import dataclass, replace

from llmtrain.urls import without_credentials

EXIT_CODE = 2
INTERRUPTED_EXIT_CODE = 75
"""Of a run that was asked to stop before its end, under every launcher: the same command goes on (sysexits'
EX_TEMPFAIL)."""

FEW = 8
"""So many names are all shown, whatever was asked for."""
MANY = 24
"""More are never all shown."""
LONGEST_PART = 1000
"""Characters of one part of a problem, which may hold a name or a value out of a file of others."""


@dataclass(frozen=True)
class Problem:
    """One thing wrong with what the user gave.

    `where` names the config key, file or shard; `got` what was found there; `allowed` what may
    stand there; `remedy` what to do next.
    """

    where: str
    got: str
    allowed: str = ""
    remedy: str = ""

    def within(self, prefix: str) -> Problem:
        """The same problem with its config key placed under `prefix`."""
        return replace(self, where=f"{prefix}.{self.where}") if prefix else self

    def of_file(self, file: str, section: str) -> Problem:
        """The same problem with its key placed in a section of a file."""
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
    """A mistake outside the program; carries every problem found, each printed as one line.

    `everywhere` says that all ranks raise it alike, so that one of them prints it; None: not known.
    """

    everywhere: bool | None = None

    def __init__(self, problems: Problem | Iterable[Problem]) -> None:
        self.problems: tuple[Problem, ...] = (problems,) if isinstance(problems, Problem) else tuple(problems)
        super().__init__(self.problems)

    def __str__(self) -> str:
        return "\n".join(map(str, self.problems))


class ConfigError(UserError):
    """A key, value or combination of values that cannot run."""


class LaunchError(UserError):
    """Ranks that are missing, or that were started with different things."""


class DataError(UserError):
    """A source, corpus, shard or tokenizer that cannot be used."""


class CheckpointError(UserError):
    """A checkpoint or run folder that cannot be used."""


class TrainingError(UserError):
    """Training cannot go on: a loss that is not finite, a full disk."""


def printable(text: str) -> str:
    """Return `text` with what would steer a terminal, or cannot be seen, by its backslash escape: names in
    files and folders of others may hold anything. Bytes that are no UTF-8 stay as Python holds them."""
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
    """The known names most like `name`, likest first, for a message; where they are few, the others too."""
    names = list(dict.fromkeys(known))
    close = difflib.get_close_matches(name, names, n=limit, cutoff=0.5)
    if len(names) <= FEW:
        close += [other for other in names if other not in close]
    elif not close and len(names) <= MANY:
        close = sorted(names)
    elif not close:
        close = difflib.get_close_matches(name, names, n=limit, cutoff=0.0)
    return ", ".join(close)
