"""Files as an attacker, a bad copy or a slip of the hand leave them: seeded changes of whole ones, and a
child process that reads each within bounds of time and memory."""

from __future__ import annotations

import copy
import json
import os
import resource
import signal
import sys
from collections.abc import Callable, Iterable
from random import Random
from typing import Any

from llmtrain.errors import UserError

SECONDS = 5
"""Of a processor's time for a read, whatever else the machine does; of the clock's twelve
times as many, for a read that waits."""
BYTES = 1500 << 20
"""Of memory that a read may take beyond what the process has."""
ODD: tuple[Any, ...] = (
    None,
    True,
    False,
    0,
    -1,
    1,
    3,
    0.5,
    -0.5,
    10**9,
    10**12,
    2**63,
    -(2**63),
    10**400,
    1e308,
    float("inf"),
    float("nan"),
    "",
    "x",
    "7",
    "a\x1b[31mb\nc",
    "half \ud800",
    "x" * 100_000,
    [],
    [None],
    [[]],
    ["a", "b", "c"],
    [3, -3, 10**12],
    {},
    {"a": {}},
    {"content": 5},
)
"""What no key expects, or few."""


def change_json(value: Any, rng: Random) -> Any:
    """Return a copy of a JSON value with a part dropped, doubled, moved or made something odd."""
    value = copy.deepcopy(value)
    for _ in range(rng.choice((1, 1, 1, 2, 4))):
        holder = value
        while True:
            keys = list(holder) if isinstance(holder, dict) else list(range(len(holder)))
            if not keys:
                break
            key = rng.choice(keys)
            inner = holder[key]
            if isinstance(inner, dict | list) and inner and rng.random() < 0.75:
                holder = inner
                continue
            what = rng.randrange(8)
            if what == 0:
                del holder[key]
            elif what == 1 and isinstance(holder, dict):
                holder[rng.choice(("odd", "", *map(str, keys)))] = holder.pop(key)
            elif what == 1:
                holder.insert(rng.randrange(len(holder) + 1), inner)
            elif what == 2 and isinstance(inner, int | float) and abs(inner) < 10**20:
                holder[key] = rng.choice(
                    (inner + 1, -inner, inner * 1000, inner * 10**9, inner / 3, str(inner))
                )
            else:
                holder[key] = copy.deepcopy(rng.choice(ODD))
            break
    return value


def change_bytes(content: bytes, rng: Random) -> bytes:
    """Return bytes with some flipped, cut, inserted, doubled or taken from elsewhere."""
    changed = bytearray(content)
    for _ in range(rng.choice((1, 1, 2, 4, 16))):
        if not changed:
            break
        # Heads, where counts and lengths are, more often than the rest.
        at = rng.randrange(len(changed) if rng.random() < 0.5 else min(len(changed), 600))
        length = rng.choice((1, 1, 2, 4, 8, 64))
        what = rng.randrange(7)
        if what == 0:
            changed[at] ^= 1 << rng.randrange(8)
        elif what == 1:
            changed[at : at + length] = rng.choice((b"\xff", b"\0", b"\x7f")) * length
        elif what == 2:
            del changed[at : at + length]
        elif what == 3:
            changed[at:at] = rng.randbytes(length)
        elif what == 4:
            changed[at:at] = changed[at : at + length]
        elif what == 5:
            start = rng.randrange(len(changed))
            changed[at : at + length] = changed[start : start + length]
        else:
            del changed[at:]
    return bytes(changed)


def as_json(value: Any) -> bytes:
    return json.dumps(value).encode()


def outcomes(
    cases: Iterable[int], read: Callable[[int], None], seconds: int = SECONDS, memory: int = BYTES
) -> dict[int, str]:
    """Return case → what was wrong with it: an exception that is no UserError, or one of many lines or
    thousands of characters; a crash; more than `seconds`, or than `memory`. read: called in a child process.
    """
    found: dict[int, str] = {}
    left = list(cases)
    while left:
        reader, writer = os.pipe()
        child = os.fork()
        if child == 0:
            os.close(reader)
            _read_all(left, read, writer, seconds, memory)
            os._exit(0)
        os.close(writer)
        with os.fdopen(reader) as pipe:
            said = [line.rstrip("\n").split("\t", 1) for line in pipe]
        _, status = os.waitpid(child, 0)
        found |= {int(case): text for case, text in said if text != "fine"}
        left = left[len(said) :]
        if status and left:
            code = os.waitstatus_to_exitcode(status)
            is_slow = -code in (signal.SIGALRM, signal.SIGPROF)
            found[left[0]] = f"hung for {seconds} s" if is_slow else f"died of {code}"
            left = left[1:]
    return found


def _read_all(cases: list[int], read: Callable[[int], None], writer: int, seconds: int, memory: int) -> None:
    null = os.open(os.devnull, os.O_WRONLY)
    os.dup2(null, 1)
    os.dup2(null, 2)
    with open("/proc/self/statm") as file:
        size = int(file.read().split()[0]) * os.sysconf("SC_PAGE_SIZE")
    resource.setrlimit(resource.RLIMIT_AS, (size + memory, size + memory))
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    for number in (signal.SIGALRM, signal.SIGPROF):
        signal.signal(number, signal.SIG_DFL)
    for case in cases:
        signal.setitimer(signal.ITIMER_PROF, seconds)
        signal.alarm(12 * seconds)
        text = "fine"
        try:
            read(case)
        except UserError as error:
            lines = str(error).split("\n")
            if len(lines) > 8 or any(len(line) > 2000 or not line.isprintable() for line in lines):
                text = (
                    f"a message of {len(lines)} lines, {len(str(error)):,} characters: {str(error)[:300]!r}"
                )
        except BaseException as error:
            place = error.__traceback__
            while place is not None and place.tb_next is not None:
                place = place.tb_next
            at = "" if place is None else f"{place.tb_frame.f_code.co_filename}:{place.tb_lineno}"
            text = f"{type(error).__name__} at {at}: {str(error)[:200]!r}"
        signal.setitimer(signal.ITIMER_PROF, 0)
        signal.alarm(0)
        os.write(writer, f"{case}\t{text}\n".encode("utf-8", "backslashreplace"))
    sys.stdout.flush()
