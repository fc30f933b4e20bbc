"""Standard input, output and error where they are closed, full, or have no reader any more.

What only tells of the work, as all on standard error does, is lost in silence: the work goes on. A command
that is asked for what it prints ends where that cannot be written.

What would steer a terminal is written by its backslash escape, wherever it came from: names in corpora and
checkpoints of others may hold anything.
"""

from __future__ import annotations

import errno
import io
import os
import re
import select
import sys
from contextlib import suppress
from typing import Any, TextIO, cast

from llmtrain.errors import EXIT_CODE, Problem
from llmtrain.urls import without_credentials

PIPE_CLOSED = 141
"""Exit code when who reads what is printed has left, as a shell gives it for SIGPIPE."""


_STEERING = re.compile(r"[\x00-\x08\x0b-\x1f\x7f-\x9f]")
_COLOUR = re.compile(r"(\x1b\[[0-9;]*m|\r)")


class OutputLost(BaseException):
    """What is printed cannot be written; no Exception, which would be taken for one of the work."""

    def __init__(self, error: OSError) -> None:
        super().__init__(error)
        self.exit_code = PIPE_CLOSED if error.errno == errno.EPIPE else EXIT_CODE
        self.problems: tuple[Problem, ...] = ()
        """None where the reader left, as of `… | head`."""
        if error.errno != errno.EPIPE:
            remedy = "print to a place that can be written"
            self.problems = (Problem("standard output", f"{error.strerror}", remedy=remedy),)


class _Stream(io.FileIO):
    """One of the process' own streams."""

    is_needed = False
    """Whether a write that fails raises OutputLost."""

    def write(self, data: Any, /) -> int:
        try:
            # None: another program made it non-blocking, and it is full.
            while (written := super().write(data)) is None:
                select.select([], [self], [])
            return written
        except OSError as error:
            if self.is_needed:
                # What is still in buffers goes nowhere.
                _open_nowhere(self.fileno())
                raise OutputLost(error) from None
            return memoryview(data).nbytes


class _Text(io.TextIOWrapper):
    """Text to one of the process' own streams."""

    may_colour = False
    """Whether colours pass, and returns to the line's beginning: libraries write both on standard error."""

    def write(self, text: str, /) -> int:
        if self.may_colour:
            parts = _COLOUR.split(text)
            super().write("".join(part if i % 2 else without_steering(part) for i, part in enumerate(parts)))
        else:
            super().write(without_steering(text))
        return len(text)


class _Unchanged:
    """A stream of ours for one who steers the terminal, and shows nothing of others as it is."""

    def __init__(self, stream: _Text) -> None:
        self._stream = stream

    def write(self, text: str, /) -> int:
        return io.TextIOWrapper.write(self._stream, text)

    def __getattr__(self, name: str) -> Any:
        return getattr(self._stream, name)


def without_steering(text: str) -> str:
    """Return `text` with control characters, but for line ends and tabs, by their backslash escapes."""
    return _STEERING.sub(lambda found: found[0].encode("unicode_escape").decode(), text)


def tell(text: str) -> None:
    """Say on standard error what a person should know; names of others in it steer nothing and give no secret
    away."""
    print(clean(text), file=sys.stderr, flush=True)


def clean(text: str) -> str:
    """Return what is told of names in files of others: without what steers a terminal, and without what URLs
    keep secret."""
    return without_steering(without_credentials(text))


def unchanged(stream: TextIO) -> TextIO:
    """Return what writes to `stream` whatever it is given, for bars and live lines."""
    return cast(TextIO, _Unchanged(stream)) if isinstance(stream, _Text) else stream


def print_text(text: str) -> None:
    """Print text that was asked for: exactly, but on a terminal as all else."""
    print(text, file=sys.stdout if sys.stdout.isatty() else unchanged(sys.stdout), flush=True)


_output: _Stream | None = None


def take_over() -> None:
    """Give this process three streams that can be used as any other; before anything else opens a file, which
    would get the number of a closed one."""
    global _output
    for number in range(3):
        try:
            os.fstat(number)
        except OSError:
            _open_nowhere(number)
    if sys.__stdout__ is None:
        sys.stdout = _text(_Stream(1, "w", closefd=False))
    elif sys.stdout is sys.__stdout__:
        _output = _Stream(1, "w", closefd=False)
        _output.is_needed = True
        sys.stdout = _text(_output, sys.__stdout__)
    if sys.__stderr__ is None or sys.stderr is sys.__stderr__:
        sys.stderr = _text(_Stream(2, "w", closefd=False), sys.__stderr__)
        sys.stderr.may_colour = True


def go_on_without_output() -> None:
    """From now on the work matters, and what is printed only tells of it."""
    if _output is not None:
        with suppress(OutputLost):
            sys.stdout.flush()
        _output.is_needed = False


def _open_nowhere(number: int) -> None:
    opened = os.open(os.devnull, os.O_RDWR)
    if opened == number:
        os.set_inheritable(number, True)
    else:
        os.dup2(opened, number)
        os.close(opened)


def _text(raw: _Stream, like: TextIO | None = None) -> _Text:
    if like is None:
        return _Text(io.BufferedWriter(raw), "utf-8", "backslashreplace", line_buffering=True)
    is_buffered = isinstance(like.buffer, io.BufferedIOBase)  # not so with python -u
    return _Text(
        io.BufferedWriter(raw) if is_buffered else raw,
        like.encoding,
        like.errors,
        line_buffering=bool(like.line_buffering),
        write_through=not is_buffered,
    )
