"""Decode nested mappings to frozen dataclasses, reporting all problems at once.

A config is a frozen dataclass. It may have a method `problems() -> Iterator[Problem]` that checks its fields;
`where` of such a problem is a key relative to the dataclass. This module does not depend on a particular
config or YAML library.
"""

from __future__ import annotations

import dataclasses
import math
import os
import re
import reprlib
import types
import typing
from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import cache
from pathlib import Path
from typing import Any, Literal, NamedTuple, TypeVar, Union

from llmtrain.errors import ConfigError, Problem, nearest

_IS_URL = re.compile(r"[\"']?[a-z][a-z0-9+.-]*://", re.IGNORECASE)
MISSING = "???"
"""YAML value of a key that the user must set."""
LARGEST_INT = 2**63 - 1
"""Largest integer of torch, numpy and parquet."""

T = TypeVar("T")
Variants = Mapping[str, Callable[[Mapping[str, Any]], type]]

_UNIONS = (Union, types.UnionType)
_MAPPINGS = (dict, Mapping)


def decode(cls: type[T], mapping: Mapping[str, Any], variants: Variants | None = None) -> T:
    """Build `cls` from a nested mapping.

    variants: dotted key → function that selects the dataclass of the section from its contents, such as by
    the family of a model; it may raise ConfigError.
    Raise ConfigError with all problems: unknown keys (with similar names), wrong types, missing keys, and
    those of the `problems()` of dataclasses.
    """
    return _decoded(cls, mapping, _Reading(variants or {}))


def decode_json(cls: type[T], mapping: Mapping[str, Any]) -> T:
    """Build `cls` from JSON written by a program. Unlike in `decode`, values must have exactly the type of
    the field (a string "1e-3" is not a number), and unknown keys are ignored.

    Raise ConfigError as `decode` does.
    """
    return _decoded(cls, mapping, _Reading({}, is_json=True))


def _decoded(cls: type[T], mapping: Mapping[str, Any], reading: _Reading) -> T:
    value = _decode_dataclass(cls, mapping, "", reading)
    if reading.problems:
        raise ConfigError(reading.problems)
    return typing.cast(T, value)


INTERNAL = "internal"
"""Marker, in a field's metadata, of a section that the program fills in: it is no key for people."""
MAY_BE_EMPTY = "may_be_empty"
"""Marker, in a field's metadata, of a text that may have no character; other texts are paths and names."""

NO_MARKERS: Mapping[str, Any] = types.MappingProxyType({})


class Leaf(NamedTuple):
    """A value that a config holds."""

    key: str
    """Dotted; `*` stands for a name that a mapping leaves open."""
    hint: Any
    """Its type."""
    markers: Mapping[str, Any]
    """The metadata of its field."""


def leaves(hint: Any, key: str = "", markers: Mapping[str, Any] = NO_MARKERS) -> Iterator[Leaf]:
    """Yield each value that a config of this type holds, in every form that its sections may have."""
    arguments = typing.get_args(hint)
    if dataclasses.is_dataclass(hint):
        hints = _type_hints(typing.cast(type, hint))
        for field in dataclasses.fields(hint):
            if INTERNAL not in field.metadata:
                yield from leaves(hints[field.name], _join(key, field.name), field.metadata)
    elif typing.get_origin(hint) in _MAPPINGS:
        yield from leaves(arguments[1], _join(key, "*"))
    elif typing.get_origin(hint) in _UNIONS and any(map(_is_section, arguments)):
        for argument in filter(_is_section, arguments):
            yield from leaves(argument, key)
    elif kinds := kinds_of(hint):
        for kind in kinds:
            yield from leaves(kind, key)
    else:
        yield Leaf(key, hint, markers)


class Kinds:
    """Base of a class whose dataclasses below are the forms of a section, one for each kind of a thing."""

    @classmethod
    def form_of(cls, section: Mapping[str, Any]) -> type:
        """Return the dataclass of a section. Raise ConfigError for a section of no kind, with a key that is
        relative to it."""
        raise NotImplementedError


def kinds_of(hint: Any) -> list[type]:
    """Return the dataclasses below a class of Kinds that is none itself, in the order of their names."""
    if not isinstance(hint, type) or not issubclass(hint, Kinds) or dataclasses.is_dataclass(hint):
        return []
    found: set[type] = set()
    waiting: list[type] = [hint]
    while waiting:
        below: list[type] = waiting.pop().__subclasses__()
        found.update(kind for kind in below if dataclasses.is_dataclass(kind))
        waiting += below
    return sorted(found, key=lambda kind: kind.__name__)


def _is_section(hint: Any) -> bool:
    return dataclasses.is_dataclass(hint) or typing.get_origin(hint) in _MAPPINGS or bool(kinds_of(hint))


def encode(value: Any) -> Any:
    """Convert a config to plain values (dicts, lists, strings, numbers) for YAML and JSON."""
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        return {f.name: encode(getattr(value, f.name)) for f in dataclasses.fields(value)}
    if isinstance(value, Mapping):
        return {str(k): encode(v) for k, v in value.items()}
    if isinstance(value, (list, tuple)):
        return [encode(v) for v in value]
    if isinstance(value, Path):
        return str(value)
    return value


@dataclasses.dataclass
class _Reading:
    """The state of one call of `decode`."""

    variants: Variants
    is_json: bool = False
    problems: list[Problem] = dataclasses.field(default_factory=list)

    def attempt(self) -> _Reading:
        """Return a state for decoding a part whose problems are collected separately."""
        return dataclasses.replace(self, problems=[])


class _Invalid:
    """Placeholder for a value whose problem is already recorded."""


_INVALID = _Invalid()


@cache
def _type_hints(cls: type) -> dict[str, Any]:
    return typing.get_type_hints(cls)


@cache
def _fields(cls: type) -> dict[str, bool]:
    """Return name of each field of __init__ → whether it is required."""
    nothing = dataclasses.MISSING
    return {
        f.name: f.default is nothing and f.default_factory is nothing
        for f in dataclasses.fields(cls)
        if f.init
    }


def _is_exact(hint: Any, raw: Any) -> bool:
    """Return whether `raw` is valid for `hint` without further checks."""
    if type(raw) is not hint:
        return False
    return (hint is str and raw != MISSING) or (hint is int and -LARGEST_INT <= raw <= LARGEST_INT)


def _decode_dataclass(cls: type, mapping: Any, prefix: str, reading: _Reading) -> Any:
    problems, variants = reading.problems, reading.variants
    if not isinstance(mapping, Mapping):
        problems.append(Problem(prefix or "config", show(mapping), "a section of keys"))
        return _INVALID
    found_before = len(problems)
    hints, fields = _type_hints(cls), _fields(cls)
    for key in () if reading.is_json else mapping:
        if key not in fields:
            where = _join(prefix, str(key))
            problems.append(Problem(where, "an unknown key", nearest(str(key), fields), "check the name"))
    values: dict[str, Any] = {}
    for name, needed in fields.items():
        if name not in mapping and not needed:
            continue
        raw = mapping.get(name, MISSING)
        if _is_exact(hints[name], raw):
            # Fast path: most values of a large manifest.
            values[name] = raw
            continue
        where = _join(prefix, name)
        # For optional keys, `???` is ordinary text from the user.
        if needed and isinstance(raw, str) and raw == MISSING:
            remedy = "" if reading.is_json else f"give {where}=…"
            problems.append(Problem(where, "nothing", _type_name(hints[name]), remedy))
            continue
        target = hints[name]
        if where in variants and isinstance(raw, Mapping):
            try:
                target = variants[where](raw)
            except ConfigError as error:
                problems.extend(error.problems)
                continue
        values[name] = _decode_value(target, raw, where, reading)
    if len(problems) > found_before:
        return _INVALID
    instance = cls(**values)
    own_problems: Callable[[], Iterator[Problem]] | None = getattr(instance, "problems", None)
    if own_problems is not None:
        problems.extend(problem.within(prefix) for problem in own_problems())
    return instance


def _decode_value(hint: Any, raw: Any, where: str, reading: _Reading) -> Any:
    problems = reading.problems
    origin = typing.get_origin(hint)
    arguments = typing.get_args(hint)
    if hint is Any:
        return raw
    if origin in _UNIONS:
        return _decode_union(arguments, raw, where, reading)
    if kinds_of(hint) and isinstance(raw, Mapping):
        try:
            hint = hint.form_of(raw)
        except ConfigError as error:
            problems.extend(problem.within(where) for problem in error.problems)
            return _INVALID
    if dataclasses.is_dataclass(hint):
        return _decode_dataclass(typing.cast(type, hint), raw, where, reading)
    if origin is Literal:
        # YAML converts words such as `off` and `1` to other types: compare with the same type.
        for allowed in arguments:
            if raw == allowed and isinstance(raw, bool) == isinstance(allowed, bool):
                return allowed
        problems.append(Problem(where, show(raw), ", ".join(map(str, arguments))))
        return _INVALID
    if origin in (tuple, list) or hint in (tuple, list):
        is_list = isinstance(raw, Sequence) and not isinstance(raw, str)
        if reading.is_json and not is_list:
            problems.append(Problem(where, show(raw), "a list"))
            return _INVALID
        items = raw if is_list else [raw]
        if origin is tuple and arguments and arguments[-1] is not Ellipsis:
            if len(items) != len(arguments):
                problems.append(Problem(where, show(raw), f"{len(arguments)} values"))
                return _INVALID
            return tuple(
                _decode_value(a, item, f"{where}[{i}]", reading)
                for i, (a, item) in enumerate(zip(arguments, items, strict=True))
            )
        element = arguments[0] if arguments else Any
        decoded = [_decode_value(element, item, f"{where}[{i}]", reading) for i, item in enumerate(items)]
        return tuple(decoded) if origin is tuple or hint is tuple else decoded
    if origin in _MAPPINGS:
        if not isinstance(raw, Mapping):
            problems.append(Problem(where, show(raw), "a section of keys"))
            return _INVALID
        element = arguments[1] if arguments else Any
        return {str(k): _decode_value(element, v, _join(where, str(k)), reading) for k, v in raw.items()}
    return _decode_scalar(hint, raw, where, reading)


def _decode_union(arguments: tuple[Any, ...], raw: Any, where: str, reading: _Reading) -> Any:
    problems = reading.problems
    if raw is None and type(None) in arguments:
        return None
    choices = [a for a in arguments if a is not type(None)]
    attempts: list[list[Problem]] = []
    for choice in choices:
        attempt = reading.attempt()
        value = _decode_value(choice, raw, where, attempt)
        if not attempt.problems:
            return value
        attempts.append(attempt.problems)
    if len(choices) > 1:
        problems.append(Problem(where, show(raw), " or ".join(dict.fromkeys(map(_type_name, arguments)))))
        return _INVALID
    # Only for the value itself is null an alternative, not for keys or items in it.
    problems += [
        dataclasses.replace(problem, allowed=f"{problem.allowed}, or null")
        if problem.where == where
        else problem
        for problem in attempts[0]
    ]
    return _INVALID


def _decode_scalar(hint: Any, raw: Any, where: str, reading: _Reading) -> Any:
    is_number = isinstance(raw, (int, float)) and not isinstance(raw, bool)
    allowed = _type_name(hint)
    if hint is bool and isinstance(raw, bool):
        return raw
    if hint is int and _is_whole(raw) and not (reading.is_json and isinstance(raw, float)):
        if abs(raw) <= LARGEST_INT:
            return int(raw)
        allowed = "a whole number between -2^63 and 2^63"
    if hint is float and (is_number or (isinstance(raw, str) and not reading.is_json)):
        # YAML 1.1 reads `1e-3` (no dot) as a string.
        try:
            number = float(raw)
        except (ValueError, OverflowError):
            number = math.nan
        if math.isfinite(number):
            return number
    if hint is str and (isinstance(raw, str) or (is_number and not reading.is_json)):
        return str(raw)
    if hint is Path and isinstance(raw, (str, Path)) and str(raw) != "":
        if not _IS_URL.match(str(raw)):
            # Path.expanduser would raise for an unknown user.
            return Path(os.path.expanduser(raw))
        # As a path, a URL would become a folder named `https:`, with the credentials in its name.
        allowed = "a path on this machine"
    reading.problems.append(Problem(where, show(raw), allowed))
    return _INVALID


def _is_whole(raw: Any) -> bool:
    if isinstance(raw, float):
        return raw.is_integer()
    return isinstance(raw, int) and not isinstance(raw, bool)


def _join(prefix: str, name: str) -> str:
    return f"{prefix}.{name}" if prefix else name


class _Show(reprlib.Repr):
    """repr that truncates long values, since a file may contain anything."""

    def __init__(self) -> None:
        super().__init__()
        self.maxstring = self.maxother = 200
        self.maxlist = self.maxtuple = self.maxdict = 20

    def repr_int(self, x: int, level: int) -> str:
        return repr(x) if x.bit_length() < 1000 else f"a whole number of {x.bit_length():,} bits"


_SHOW = _Show()


def show(value: Any) -> str:
    """Format a value for a message as Python does, in at most 80 characters."""
    text = "nothing" if value is None else _SHOW.repr(value)
    return text if len(text) <= 80 else text[:77] + "…"


def short(text: str) -> str:
    """Truncate a name to 120 characters for a message."""
    return text if len(text) <= 120 else f"{text[:117]}…"


def _type_name(hint: Any) -> str:
    names = {
        int: "a whole number",
        float: "a finite number",
        str: "text",
        bool: "true or false",
        Path: "a path",
    }
    if hint in names:
        return names[hint]
    if hint is type(None):
        return "null"
    origin, arguments = typing.get_origin(hint), typing.get_args(hint)
    if origin is Literal:
        return ", ".join(map(str, arguments))
    if origin in _UNIONS:
        return " or ".join(map(_type_name, arguments))
    if origin in (tuple, list):
        return "a list"
    return "a section of keys"


def require(condition: bool, where: str, got: object, allowed: str, remedy: str = "") -> Iterator[Problem]:
    """Yield a Problem unless `condition` holds; for `yield from` in the `problems()` of a config."""
    if not condition:
        yield Problem(where, show(got), allowed, remedy)


def require_utf8(where: str, path: Path) -> Iterator[Problem]:
    """Yield a Problem if a path is not UTF-8, which the safetensors library requires."""
    is_utf8 = not any("\udc80" <= character <= "\udcff" for character in str(path))
    yield from require(is_utf8, where, str(path), "a path in UTF-8", "rename it, or choose another")
