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
import stat
from collections.abc import Mapping
from pathlib import Path
from typing import Any, TypeVar

from llmtrain.config import decode_json, show
from llmtrain.errors import ConfigError, Problem, UserError

SETTINGS_BYTES = 16 << 20
"""More than any file of settings that people or programs write."""
MOST_PROBLEMS = 8
"""Told of one file: the rest is of the same kind."""
LONGEST_NUMBER = 4300
"""Digits; Python's own bound of what it turns into an int."""
_HALF = re.compile(r"[\ud800-\udfff]|\\u[dD][89a-fA-F]")
"""A half of a character, itself or as JSON writes it."""
_KINDS = {
    stat.S_IFDIR: "a folder",
    stat.S_IFIFO: "a pipe",
    stat.S_IFCHR: "a device",
    stat.S_IFBLK: "a device",
    stat.S_IFSOCK: "a socket",
}

T = TypeVar("T")


def open_regular(path: str | Path, flags: int = os.O_RDONLY) -> int:
    """Open a file, never a pipe or a device, which could hang, be endless, or do something; an `opener` of
    `open`. A link is followed: stores of models are made of links.

    Raises OSError (EINVAL) for what is no file.
    """
    # Not to wait for who writes to a pipe, nor take over a terminal.
    descriptor = os.open(path, flags | os.O_NONBLOCK | os.O_NOCTTY | os.O_CLOEXEC)
    kind = stat.S_IFMT(os.fstat(descriptor).st_mode)
    if kind != stat.S_IFREG:
        os.close(descriptor)
        raise OSError(errno.EINVAL, f"{_KINDS.get(kind, 'something else')}, not a file", str(path))
    return descriptor


def read_bytes(path: Path, at_most: int) -> bytes:
    """Return a file's content. Raises OSError, before any of it is read, for more than `at_most` bytes."""
    with open(path, "rb", opener=open_regular) as file:
        size = os.fstat(file.fileno()).st_size
        if size <= at_most:
            content = file.read(at_most + 1)
            size = max(size, len(content))
    if size > at_most:
        raise OSError(errno.EINVAL, f"a file of {size:,} bytes, more than {at_most:,}", str(path))
    return content


class _KeyTwiceError(Exception):
    """A key that stands twice in an object."""


def parse_json(content: bytes | str, *, unique: bool = False) -> Any:
    """Return the value of a JSON text. Raises ValueError, with a short reason, for what is none, and for
    halves of characters, which no file and no library takes. unique: a key twice is refused too."""
    try:
        text = content if isinstance(content, str) else content.decode()
        value = json.loads(text, object_pairs_hook=_unique if unique else None)
    except UnicodeDecodeError as error:
        raise ValueError(f"no UTF-8 at byte {error.start:,}") from None
    except RecursionError:
        raise ValueError("brackets within brackets, too many") from None
    except json.JSONDecodeError as error:
        raise ValueError(f"no JSON: {error}") from None
    except _KeyTwiceError as error:
        raise ValueError(f"the key {show(error.args[0])} twice") from None
    except ValueError:
        raise ValueError(f"a number of more than {LONGEST_NUMBER:,} digits") from None
    # Whole characters beyond the first 65,536 are written so too, as two halves.
    if _HALF.search(text):
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


def parse_object(content: bytes | str, *, unique: bool = False) -> dict[str, Any]:
    """Return the object of a JSON text. Raises ValueError for what is none, as `parse_json`."""
    value = parse_json(content, unique=unique)
    if not isinstance(value, dict):
        raise ValueError(f"{kind_of(value)} in place of an object")
    return value


def kind_of(value: Any) -> str:
    """Return what a JSON value is, in words."""
    names = {dict: "an object", list: "a list", str: "text", bool: "true or false", type(None): "null"}
    return names.get(type(value), "a number")


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
