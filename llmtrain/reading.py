"""Files that somebody else may have written: opened only where they are files, read up to a bound, and
decoded into types.

Whoever reads one says what it is to the user: functions here raise OSError or ValueError, whose text is a
phrase for `Problem.got`.
"""

from __future__ import annotations

import errno
import json
import os
import re
from collections.abc import Callable, Mapping
from functools import cache
from pathlib import Path
from typing import Any, TypeVar

from llmtrain.config import decode_json, show
from llmtrain.errors import ConfigError, Problem, UserError
from llmtrain.files import open_regular

SETTINGS_BYTES = 16 << 20
"""More than any file of settings that people or programs write."""
MOST_JSON_VALUES = 1_000_000
MOST_VALUES = 100_000
"""Of a section in YAML; ours have some hundreds."""
MOST_PROBLEMS = 8
"""Told of one file: the rest is of the same kind."""
LONGEST_YAML_NUMBER = 100
LONGEST_NUMBER = 4300
"""Digits; Python's own bound of what it turns into an int."""
_HALF = re.compile(r"[\ud800-\udfff]|\\u[dD][89a-fA-F]")
"""A half of a character, itself or as JSON writes it."""

__all__ = [
    "decode_file",
    "kind_of",
    "open_regular",
    "parse_json",
    "parse_object",
    "parse_yaml",
    "read_bytes",
    "read_decoded",
]

T = TypeVar("T")


def read_bytes(path: Path, at_most: int) -> bytes:
    """Return a file's content. Raise OSError, before any of it is read, for more than `at_most` bytes."""
    with open(path, "rb", opener=open_regular) as file:
        size = os.fstat(file.fileno()).st_size
        if size <= at_most:
            content = file.read(at_most + 1)
            size = max(size, len(content))
    if size > at_most:
        raise OSError(errno.EINVAL, f"a file of {size:,} bytes, more than {at_most:,}", str(path))
    return content


class _TooManyError(Exception):
    """More values than may be."""


class _KeyTwiceError(Exception):
    """A key that stands twice in an object."""


def parse_json(
    content: bytes | str, *, unique: bool = False, utf8: bool = False, most: int = MOST_JSON_VALUES
) -> Any:
    """Return the value of a JSON text. Raise ValueError, with a short reason, for what is none.

    most: values that it may hold: each takes some 75 bytes of memory, and may take three of the file.
    unique: refuse a key that stands twice in an object.
    utf8: refuse halves of characters, which no text that is written, and no library, takes; file names may
        hold them.
    """
    try:
        text = content if isinstance(content, str) else content.decode()
        values = sum(map(text.count, ",[{"))
        if values > most:
            raise _TooManyError(f"{values:,} values, more than {most:,}")
        value = json.loads(text, object_pairs_hook=_unique if unique else None)
    except UnicodeDecodeError as error:
        raise ValueError(f"no UTF-8 at byte {error.start:,}") from None
    except RecursionError:
        raise ValueError("brackets within brackets, too many") from None
    except json.JSONDecodeError as error:
        raise ValueError(f"no JSON: {error}") from None
    except _TooManyError as error:
        raise ValueError(str(error)) from None
    except _KeyTwiceError as error:
        raise ValueError(f"the key {show(error.args[0])} twice") from None
    except ValueError:
        raise ValueError(f"a number of more than {LONGEST_NUMBER:,} digits") from None
    # Whole characters beyond the first 65,536 are written so too, as two halves.
    if utf8 and _HALF.search(text):
        try:
            json.dumps(value, ensure_ascii=False).encode()
        except UnicodeEncodeError:
            raise ValueError("text with half a character (a lone surrogate)") from None
    return value


def _unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found: dict[str, Any] = {}
    for key, value in pairs:
        if key in found:
            raise _KeyTwiceError(key)
        found[key] = value
    return found


def parse_object(
    content: bytes | str, *, unique: bool = False, utf8: bool = False, most: int = MOST_JSON_VALUES
) -> dict[str, Any]:
    """Return the object of a JSON text. Raise ValueError for what is none, as `parse_json`."""
    value = parse_json(content, unique=unique, utf8=utf8, most=most)
    if not isinstance(value, dict):
        raise ValueError(f"{kind_of(value)} in place of an object")
    return value


def parse_yaml(content: bytes) -> dict[str, Any]:
    """Return the section of keys of a YAML text. Raise ValueError, with a short reason, for what is none,
    and for one whose aliases multiply."""
    import yaml

    try:
        # The safe loader too, in C where it was built.
        value = yaml.load(content, _yaml_loader())  # noqa: S506
    except yaml.YAMLError as error:
        mark = getattr(error, "problem_mark", None)
        place = "" if mark is None else f" in line {mark.line + 1}"
        raise ValueError(f"no YAML: {getattr(error, 'problem', None) or 'odd characters'}{place}") from None
    except RecursionError:
        raise ValueError("brackets within brackets, too many") from None
    except Exception:  # of its constructors, which do not expect dates and numbers that are none
        raise ValueError("no YAML: a date or a number that is none") from None
    if not isinstance(value, dict):
        raise ValueError(f"{kind_of(value)} in place of a section of keys")
    _refuse_multiplied(value)
    return value


@cache
def _yaml_loader() -> Any:
    """PyYAML's safe loader, for which a number is no longer than numbers are: the time for one of many
    digits, or of many parts by 60, grows with the square of its length."""
    import yaml

    class Loader(getattr(yaml, "CSafeLoader", yaml.SafeLoader)):  # type: ignore[misc]
        pass

    def construct(loader: Any, node: Any) -> Any:
        if len(node.value) > LONGEST_YAML_NUMBER:
            raise ValueError("a number of many digits")
        kind = node.tag.rpartition(":")[2]
        return getattr(loader, f"construct_yaml_{kind}")(node)

    for kind in ("int", "float"):
        Loader.add_constructor(f"tag:yaml.org,2002:{kind}", construct)
    return Loader


def _refuse_multiplied(value: Any) -> None:
    """An alias costs nothing until somebody writes out what it stands for."""
    waiting, seen = [value], 0
    while waiting:
        found = waiting.pop()
        seen += 1
        if seen > MOST_VALUES:
            raise ValueError(f"aliases that stand for more than {MOST_VALUES:,} values")
        if isinstance(found, dict):
            waiting += found.values()
        elif isinstance(found, (list, tuple, set)):
            waiting += found


def kind_of(value: Any) -> str:
    """Return what a JSON value is, in words."""
    names = {dict: "an object", list: "a list", str: "text", bool: "true or false", type(None): "null"}
    return names.get(type(value), "a number")


def read_decoded(
    cls: type[T],
    path: Path,
    at_most: int,
    failure: type[UserError],
    allowed: str,
    remedy: str = "",
    parse: Callable[[bytes], Mapping[str, Any]] = parse_object,
) -> T:
    """Build `cls` from the file at `path`. Raises `failure` for one that cannot be read, has more than
    `at_most` bytes or says other things; `allowed` and `remedy`: what may stand there, and what to do."""
    try:
        content = parse(read_bytes(path, at_most))
    except (OSError, ValueError) as error:
        reason = error.strerror if isinstance(error, OSError) else error
        raise failure(Problem(str(path), f"an unreadable file ({reason})", allowed, remedy)) from None
    return decode_file(cls, content, str(path), failure)


def decode_file(cls: type[T], content: Mapping[str, Any], where: str, failure: type[UserError]) -> T:
    """Build `cls` from what a program wrote into the file `where`; keys that `cls` lacks are left alone.

    Raises `failure`, with the file, the field, what was got and what is allowed.
    """
    try:
        return decode_json(cls, content)
    except ConfigError as error:
        found = [
            Problem(f"{where}: {problem.where}", problem.got, problem.allowed) for problem in error.problems
        ]
        raise failure(found[:MOST_PROBLEMS]) from None
