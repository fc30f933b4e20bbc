"""Files that somebody else may have written: opened only where they are files, read up to a bound, and
decoded into types.

Whoever reads one says what it is to the user: functions here raise OSError or ValueError, whose text is a
phrase for `Problem.got`.
"""

from __future__ import annotations

import errno
import json
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any, TypeVar

from llmtrain.config import decode_json
from llmtrain.errors import ConfigError, Problem, UserError
from llmtrain.files import open_regular

SETTINGS_BYTES = 16 << 20
"""More than any file of settings that people or programs write."""
MOST_PROBLEMS = 8
"""Told of one file: the rest is of the same kind."""
LONGEST_NUMBER = 4300
"""Digits; Python's own bound of what it turns into an int."""

__all__ = ["decode_file", "kind_of", "open_regular", "parse_json", "parse_object", "read_bytes"]

T = TypeVar("T")


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


def parse_json(content: bytes | str) -> Any:
    """Return the value of a JSON text. Raises ValueError, with a short reason, for what is none."""
    try:
        return json.loads(content if isinstance(content, str) else content.decode())
    except UnicodeDecodeError as error:
        raise ValueError(f"no UTF-8 at byte {error.start:,}") from None
    except RecursionError:
        raise ValueError("brackets within brackets, too many") from None
    except json.JSONDecodeError as error:
        raise ValueError(f"no JSON: {error}") from None
    except ValueError:
        raise ValueError(f"a number of more than {LONGEST_NUMBER:,} digits") from None


def parse_object(content: bytes | str) -> dict[str, Any]:
    """Return the object of a JSON text. Raises ValueError for what is none."""
    value = parse_json(content)
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
