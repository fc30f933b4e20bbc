"""Files as a stranger, a broken disk or an attacker may hand them over: real ones, changed a little.

    mutate(content, "json", "checkpoint/17")   # the same bytes for the same arguments, at every call

Some of the changes know nothing of the format. The others (of mutated_formats.py too) know enough to get past
the first check: a JSON text stays one, a header's length fits the header.
"""

from __future__ import annotations

import contextlib
import json
import random
from collections.abc import Callable, Sequence
from typing import Any

import yaml

Random = random.Random
LONG_TEXT = 100_000
"""Characters of a text that no one wrote by hand."""
NUMBERS = (0, 1, 2**31, 2**32 - 1, 2**60, 2**63, 2**64 - 1)
"""At which sizes and offsets go wrong."""
_HEAD, _TAIL = 256, 512
"""Bytes at a file's ends, where most formats say what they hold."""


def mutate(content: bytes, kind: str, seed: str, other: bytes = b"") -> bytes:
    """One to four changes of `content`. kind: a key of FORMATS, or "bytes"; other: what a part may be
    taken from."""
    from tests.support.mutated_formats import FORMATS

    source = Random(seed)
    formats = {"json": of_json, "jsonl": of_lines, "yaml": of_yaml, **FORMATS}
    for _ in range(source.choice((1, 1, 1, 2, 4))):
        if kind in formats and source.random() < 0.8:
            try:
                content = formats[kind](content, source)
                continue
            except Exception:
                pass  # an earlier change has left no such format
        content = of_bytes(content, source, other)
    return content


# Bytes.


def of_bytes(content: bytes, source: Random, other: bytes = b"") -> bytes:
    changed = bytearray(content)
    source.choice(_OF_BYTES)(changed, source, other)
    return bytes(changed)


def _place(size: int, source: Random) -> int:
    """One of `size` bytes; often one near either end."""
    chance = source.random()
    if chance < 0.3:
        return source.randrange(max(1, min(size, _HEAD)))
    if chance < 0.5:
        return source.randrange(max(0, size - _TAIL), max(1, size))
    return source.randrange(max(1, size))


def _span(size: int, source: Random) -> slice:
    start = _place(size, source)
    return slice(start, start + source.choice((1, 2, 4, 8, 16, 64, 512, 4096)))


def _flip(content: bytearray, source: Random, other: bytes) -> None:
    for _ in range(source.choice((1, 1, 2, 8)) if content else 0):
        content[_place(len(content), source)] ^= 1 << source.randrange(8)


def _fill(content: bytearray, source: Random, other: bytes) -> None:
    span = _span(len(content), source)
    content[span] = bytes([source.choice((0, 255))]) * len(content[span])


def _write_number(content: bytearray, source: Random, other: bytes) -> None:
    """An integer of four or eight bytes, little-endian as all formats here have them."""
    width, place = source.choice((4, 8)), _place(len(content), source)
    number = source.choice(NUMBERS) % (1 << 8 * width)
    content[place : place + width] = number.to_bytes(width, "little")


def _truncate(content: bytearray, source: Random, other: bytes) -> None:
    del content[_place(len(content), source) :]


def _extend(content: bytearray, source: Random, other: bytes) -> None:
    content += source.choice((b"\0", b"\xff", b"\n", b"{", source.randbytes(16))) * source.choice(
        (1, 64, 4096)
    )


def _insert(content: bytearray, source: Random, other: bytes) -> None:
    place = _place(len(content), source)
    content[place:place] = source.randbytes(source.choice((1, 2, 8, 64)))


def _delete(content: bytearray, source: Random, other: bytes) -> None:
    del content[_span(len(content), source)]


def _repeat(content: bytearray, source: Random, other: bytes) -> None:
    span = _span(len(content), source)
    content[span] = bytes(content[span]) * source.choice((2, 2, 100))


def _swap(content: bytearray, source: Random, other: bytes) -> None:
    a, b = _span(len(content), source), _span(len(content), source)
    content[a], content[b] = bytes(content[b]), bytes(content[a])


def _splice(content: bytearray, source: Random, other: bytes) -> None:
    """From some place on it is another file."""
    other = other or bytes(content)
    content[_place(len(content), source) :] = other[_place(len(other), source) :]


_OF_BYTES: Sequence[Callable[[bytearray, Random, bytes], None]] = (
    *(_flip, _flip, _fill, _write_number, _write_number, _truncate, _extend, _insert, _delete, _repeat),
    *(_swap, _splice),
)


# JSON.


class Raw(str):
    """A value's JSON text, which no Python value may have."""


class Pairs(list):
    """An object's (key, value), of which keys may be alike."""


NAUGHTY_TEXTS = (
    "",
    "\x1b[2J\x1b[31mred",
    "\r\nSecond line",
    "\ud800",
    "\0",
    "../../../etc/passwd",
    "/dev/zero",
    "a" * LONG_TEXT,
    "ﷺ\u202e\u2028",
    "file:///etc/passwd",
    "1",
)
_VALUES: tuple[Any, ...] = (
    *map(
        Raw,
        (
            "null",
            "true",
            "false",
            "0",
            "-1",
            "1",
            "0.5",
            "-0.0",
            "1e-400",
            "1e400",
            "-1e400",
            "NaN",
            "Infinity",
        ),
    ),
    *(Raw(sign + str(number)) for number in (*NUMBERS, 10**30) for sign in ("", "-")),
    Raw("9" * 5000),
    Raw("[" * LONG_TEXT + "]" * LONG_TEXT),
    Raw('{"a":' * 5000 + "1" + "}" * 5000),
    Raw("[" + "0," * 20_000 + "0]"),
    Raw("[]"),
    Raw("{}"),
    Raw("[[]]"),
    Raw("[null]"),
    Raw('{"": null}'),
    Raw('"' + "\\ud800" + '"'),
    *NAUGHTY_TEXTS,
)


def parse(content: bytes) -> Any:
    """JSON with objects as Pairs. Raises ValueError for what is none."""
    return json.loads(content.decode(), object_pairs_hook=Pairs)


def dump(value: Any) -> str:
    if isinstance(value, Raw):
        return str(value)
    if isinstance(value, Pairs):
        return "{" + ", ".join(f"{json.dumps(key)}: {dump(item)}" for key, item in value) + "}"
    if isinstance(value, list):
        return "[" + ", ".join(map(dump, value)) + "]"
    return json.dumps(value)


def of_json(content: bytes, source: Random) -> bytes:
    return dump(changed(parse(content), source)).encode()


def of_lines(content: bytes, source: Random) -> bytes:
    """JSON, one value a line."""
    lines = content.splitlines(keepends=True)
    number = source.randrange(len(lines))
    lines[number] = of_json(lines[number], source) + b"\n"
    return b"".join(lines)


def changed(value: Any, source: Random, values: Sequence[Any] = _VALUES) -> Any:
    """The value with one change in it, at a place that is as likely deep as shallow."""
    if not isinstance(value, list) or not value or source.random() < 0.03:
        return source.choice(values)
    holder = value
    while True:
        at = source.randrange(len(holder))
        child = holder[at][1] if isinstance(holder, Pairs) else holder[at]
        if not (isinstance(child, list) and child and source.random() < 0.85):
            break
        holder = child
    _change_item(holder, at, value, source, values)
    return value


def _change_item(holder: list[Any], at: int, root: Any, source: Random, values: Sequence[Any]) -> None:
    is_object = isinstance(holder, Pairs)
    key, old = holder[at] if is_object else (None, holder[at])
    if isinstance(old, str) and old.startswith("{") and source.random() < 0.8:
        # A file within a file.
        with contextlib.suppress(ValueError):
            new = of_json(old.encode(), source).decode()
            holder[at] = (key, new) if is_object else new
            return
    kind = source.choice(
        ("replace",) * 4 + ("nudge", "nudge", "drop", "rename", "again", "move", "wrap", "swap")
    )
    if kind == "drop":
        del holder[at]
        return
    if kind == "swap":
        other = source.randrange(len(holder))
        holder[at], holder[other] = holder[other], holder[at]
        if is_object:  # their values alone
            (a, x), (b, y) = holder[at], holder[other]
            holder[at], holder[other] = (b, x), (a, y)
        return
    if kind == "again":
        item = source.choice((old, source.choice(values)))
        holder.append((key, item) if is_object else item)
        return
    if kind == "rename" and is_object:
        holder[at] = (source.choice((*NAUGHTY_TEXTS, key.upper(), f"{key}_", "__class__")), old)
        return
    new = source.choice(values)
    if kind == "nudge":
        new = _nudged(old, source)
    elif kind == "wrap":
        new = source.choice(([old], Pairs([("a", old)]), str(old), Raw("[]"), Raw("{}")))
    elif kind == "move":
        new = _some_value(root, source)
    holder[at] = (key, new) if is_object else new


def _nudged(old: Any, source: Random) -> Any:
    """A value of the same type."""
    if isinstance(old, bool):
        return not old
    if isinstance(old, int | float):
        return source.choice((old + 1, old - 1, -old, old * 2, old * 2**32, old / 2, 0, float(old)))
    if isinstance(old, str):
        at = source.randrange(len(old) + 1)
        inserted = source.choice((*NAUGHTY_TEXTS, old))
        return source.choice((old[:at] + inserted + old[at:], old[:at], old.swapcase(), old + "x"))
    return source.choice((Raw("[]"), Raw("{}"), None))


def _some_value(value: Any, source: Random) -> Any:
    """A value of anywhere in the tree."""
    while isinstance(value, list) and value and source.random() < 0.8:
        value = source.choice(value)
        value = value[1] if isinstance(value, tuple) else value
    # A copy: a tree that holds itself has no text.
    return Raw(dump(value))


# YAML.

_BOMB = Raw("[&a0 [x], " + ", ".join(f"&a{i} [{', '.join([f'*a{i - 1}'] * 10)}]" for i in range(1, 9)) + "]")
"""A hundred million values in a line."""
_YAML_VALUES = (
    *_VALUES,
    *map(
        Raw,
        (
            _BOMB,
            "&self [*self]",
            "&self {a: *self}",
            "!!python/object/apply:os.getcwd []",
            "!!int x",
            "!!binary x",
            "!!timestamp x",
            "2001-99-99",
            "2001-01-01",
            "{<<: [1]}",
            "{? [a] : b}",
            "1:99:99",
            ".inf",
            "*nothing",
        ),
    ),
)


def of_yaml(content: bytes, source: Random) -> bytes:
    """What is written anew is JSON, which YAML holds."""
    value = _as_pairs(yaml.safe_load(content.decode()))
    return dump(changed(value, source, _YAML_VALUES)).encode()


def _as_pairs(value: Any) -> Any:
    if isinstance(value, dict):
        return Pairs((key, _as_pairs(item)) for key, item in value.items())
    return [_as_pairs(item) for item in value] if isinstance(value, list) else value
