"""Templates of prompts: text with the fields of a row and the place of the answer. Free of torch."""

from __future__ import annotations

import string
from collections.abc import Mapping
from typing import Any, NamedTuple

from llmtrain.objectives.fields import text_of

ANSWER = "answer"


class Piece(NamedTuple):
    """A part of a template."""

    space: str
    """"" or " ", which precedes it: a word is encoded with the space before it, as in running text."""
    text: str = ""
    """Text that stands there as it is; "" for a field."""
    field: str = ""


class Template(NamedTuple):
    """The parts before the answer and after it."""

    before: tuple[Piece, ...]
    after: tuple[Piece, ...]
    space: str
    """The space before the answer."""

    @property
    def fields(self) -> tuple[str, ...]:
        """Return the fields of a row that it shows, each once."""
        return tuple(dict.fromkeys(piece.field for piece in (*self.before, *self.after) if piece.field))

    def content(self, values: Mapping[str, Any]) -> tuple[str, ...]:
        """Return the texts of the fields of a row. Raise ValueError as tasks do."""
        return tuple(text_of(values, name) for name in self.fields)


def parse(text: str) -> Template:
    """Return the template of a text like "{text} It was {answer}."; raise ValueError with what is wrong."""
    sides: tuple[list[Piece], list[Piece]] = ([], [])
    space_of_answer, seen, carried = "", 0, ""
    try:
        parts = list(string.Formatter().parse(text))
    except ValueError as error:
        raise ValueError(str(error)) from error
    for literal, name, form, conversion in parts:
        kept = literal.rstrip(" ")
        if kept:
            stripped = kept.lstrip(" ")
            has_space = carried or kept != stripped
            sides[min(seen, 1)].append(Piece(" " if has_space else "", stripped))
            carried = ""
        carried = " " if len(literal) > len(kept) else carried
        if name is None:
            continue
        if form or conversion or not name:
            raise ValueError(f"{{{name}}} with a format" if name else "{} without a name")
        if name == ANSWER:
            seen += 1
            space_of_answer = carried
        else:
            sides[min(seen, 1)].append(Piece(carried, field=name))
        carried = ""
    if seen != 1:
        raise ValueError(f"{{{ANSWER}}} {seen} times" if seen else f"no {{{ANSWER}}}")
    template = Template(tuple(sides[0]), tuple(sides[1]), space_of_answer)
    if not template.fields:
        raise ValueError("no field of the row")
    return template
