"""Names that an override's mapping gives twice, of which Hydra would silently take the last."""

from __future__ import annotations

from collections.abc import Iterable

from llmtrain.errors import ConfigError, Problem


def refuse_repeated(overrides: Iterable[str]) -> None:
    """Raise ConfigError for each name that a mapping in an override, {name: value, …}, holds twice."""
    problems = [
        Problem(key.lstrip("+"), f"the name {name} twice", "each name once")
        for key, _, value in (override.partition("=") for override in overrides)
        if value.lstrip().startswith("{")
        for name in repeated_names(value)
    ]
    if problems:
        raise ConfigError(problems)


def repeated_names(text: str) -> list[str]:
    """Return the names that a mapping holds for the second time, in mappings within it too."""
    found: list[str] = []
    open_ones: list[set[str] | None] = []  # the names of each mapping around, None for a list
    word: str | None = ""  # since the last comma or bracket; None after a name
    quote = ""
    for character in text:
        if quote:
            quote = "" if character == quote else quote
        elif character in "'\"":
            quote = character
        elif character in "{[":
            open_ones.append(set() if character == "{" else None)
            word = ""
        elif character in "}]":
            del open_ones[-1:]
            word = None
        elif character == ",":
            word = ""
        elif character == ":" and open_ones and (names := open_ones[-1]) is not None and word is not None:
            name = word.strip()
            if name in names:
                found.append(name)
            names.add(name)
            word = None
        elif word is not None:
            word += character
    return found
