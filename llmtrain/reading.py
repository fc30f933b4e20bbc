"""Read and decode files from untrusted sources: regular files only, up to a size limit, with type checks.

Functions raise OSError or ValueError with a phrase for `Problem.got`; the caller names the file to the user.
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
"""Maximum size of settings files, more than any real one has."""
MOST_JSON_VALUES = 1_000_000
MOST_VALUES = 100_000
"""Maximum number of values in YAML, with aliases expanded; configs have some hundreds."""
MOST_PROBLEMS = 8
"""Maximum number of problems reported for one file."""
LONGEST_YAML_NUMBER = 100
"""Maximum characters of a number in YAML."""
LONGEST_NUMBER = 4300
"""Maximum digits of a number, Python's own limit for conversion to int."""
_SURROGATE = re.compile(r"[\ud800-\udfff]|\\u[dD][89a-fA-F]")
"""A surrogate, literally or as a JSON escape."""

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
    """Return the contents of a file. Raise OSError, before reading, if it has more than `at_most` bytes."""
    with open(path, "rb", opener=open_regular) as file:
        size = os.fstat(file.fileno()).st_size
        if size <= at_most:
            content = file.read(at_most + 1)
            size = max(size, len(content))
    if size > at_most:
        raise OSError(errno.EINVAL, f"a file of {size:,} bytes, more than {at_most:,}", str(path))
    return content


class _TooManyError(Exception):
    """More values than allowed."""


class _DuplicateKeyError(Exception):
    """A key that occurs twice in an object."""


def parse_json(
    content: bytes | str, *, unique: bool = False, utf8: bool = False, most: int = MOST_JSON_VALUES
) -> Any:
    """Parse JSON.

    unique: reject duplicate keys in an object.
    utf8: reject lone surrogates, which cannot be encoded; only file names may contain them.
    most: maximum number of values; a value takes about 75 bytes of memory, but may take only three of the
    file.
    Raise ValueError with a short reason if the text is invalid.
    """
    try:
        text = content if isinstance(content, str) else content.decode()
        values = sum(map(text.count, ",[{"))
        if values > most:
            raise _TooManyError(f"{values:,} values, more than {most:,}")
        value = json.loads(text, object_pairs_hook=_unique if unique else None)
    except UnicodeDecodeError as error:
        raise ValueError(f"invalid UTF-8 at byte {error.start:,}") from None
    except RecursionError:
        raise ValueError("values that are nested too deeply") from None
    except json.JSONDecodeError as error:
        raise ValueError(f"invalid JSON: {error}") from None
    except _TooManyError as error:
        raise ValueError(str(error)) from None
    except _DuplicateKeyError as error:
        raise ValueError(f"the key {show(error.args[0])} twice") from None
    except ValueError:
        raise ValueError(f"a number of more than {LONGEST_NUMBER:,} digits") from None
    # Pairs of surrogate escapes are valid: they denote characters above U+FFFF.
    if utf8 and _SURROGATE.search(text):
        try:
            json.dumps(value, ensure_ascii=False).encode()
        except UnicodeEncodeError:
            raise ValueError("text with a lone surrogate") from None
    return value


def _unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found: dict[str, Any] = {}
    for key, value in pairs:
        if key in found:
            raise _DuplicateKeyError(key)
        found[key] = value
    return found


def parse_object(
    content: bytes | str, *, unique: bool = False, utf8: bool = False, most: int = MOST_JSON_VALUES
) -> dict[str, Any]:
    """Parse a JSON object. Raise ValueError as `parse_json` does, and for other values."""
    value = parse_json(content, unique=unique, utf8=utf8, most=most)
    if not isinstance(value, dict):
        raise ValueError(f"{kind_of(value)} instead of an object")
    return value


def parse_yaml(content: bytes) -> dict[str, Any]:
    """Parse YAML whose top level is a mapping. Raise ValueError with a short reason if it is invalid, or
    aliases expand to more than MOST_VALUES values."""
    import yaml

    try:
        # A subclass of the safe loader, in C if available.
        value = yaml.load(content, _yaml_loader())  # noqa: S506
    except yaml.YAMLError as error:
        mark = getattr(error, "problem_mark", None)
        line = "" if mark is None else f" in line {mark.line + 1}"
        reason = getattr(error, "problem", None) or "unreadable characters"
        raise ValueError(f"invalid YAML: {reason}{line}") from None
    except RecursionError:
        raise ValueError("values that are nested too deeply") from None
    except Exception:  # constructors raise various errors for invalid dates and numbers
        raise ValueError("invalid YAML: an invalid date or number") from None
    if not isinstance(value, dict):
        raise ValueError(f"{kind_of(value)} instead of a section of keys")
    _refuse_alias_expansion(value)
    return value


@cache
def _yaml_loader() -> Any:
    """Return PyYAML's safe loader with a limit on the length of numbers: the time to convert decimal and
    sexagesimal numbers is quadratic in their length."""
    import yaml

    class Loader(getattr(yaml, "CSafeLoader", yaml.SafeLoader)):  # type: ignore[misc]
        pass

    def construct(loader: Any, node: Any) -> Any:
        if len(node.value) > LONGEST_YAML_NUMBER:
            raise ValueError("a number of too many digits")
        kind = node.tag.rpartition(":")[2]
        return getattr(loader, f"construct_yaml_{kind}")(node)

    for kind in ("int", "float"):
        Loader.add_constructor(f"tag:yaml.org,2002:{kind}", construct)
    return Loader


def _refuse_alias_expansion(value: Any) -> None:
    """Raise ValueError if aliases expand to too many values, which costs memory only once they are written
    out."""
    waiting, seen = [value], 0
    while waiting:
        found = waiting.pop()
        seen += 1
        if seen > MOST_VALUES:
            raise ValueError(f"aliases that expand to more than {MOST_VALUES:,} values")
        if isinstance(found, dict):
            waiting += found.values()
        elif isinstance(found, (list, tuple, set)):
            waiting += found


def kind_of(value: Any) -> str:
    """Describe the type of a JSON value."""
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
    """Build `cls` from the file at `path`.

    failure: class of the error to raise if the file is unreadable, larger than `at_most` bytes or does not
    match `cls`.
    allowed, remedy: parts of the message for an unreadable file.
    """
    try:
        content = parse(read_bytes(path, at_most))
    except (OSError, ValueError) as error:
        reason = error.strerror if isinstance(error, OSError) else error
        raise failure(Problem(str(path), f"an unreadable file ({reason})", allowed, remedy)) from None
    return decode_file(cls, content, str(path), failure)


def decode_file(cls: type[T], content: Mapping[str, Any], where: str, failure: type[UserError]) -> T:
    """Build `cls` from the contents of the file `where`, written by a program; ignore unknown keys.

    failure: class of the error to raise if the contents do not match `cls`.
    """
    try:
        return decode_json(cls, content)
    except ConfigError as error:
        found = [
            Problem(f"{where}: {problem.where}", problem.got, problem.allowed) for problem in error.problems
        ]
        raise failure(found[:MOST_PROBLEMS]) from None
