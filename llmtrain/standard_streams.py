"""Make standard input, output and error robust against closed or full streams and lost readers.

Messages about the work, such as everything on stderr, are dropped silently if they cannot be written, and the
work continues. A command whose purpose is its output ends if that cannot be written.

Terminal control characters are written as backslash escapes, because names in foreign corpora and checkpoints
may contain anything.
"""

from __future__ import annotations

import errno
import io
import os
import re
import select
import sys
from collections.abc import Callable
from contextlib import suppress
from typing import Any, TextIO, cast

from llmtrain.errors import EXIT_CODE, Problem
from llmtrain.urls import without_credentials

Say = Callable[[str], None]
"""What tells a user one line."""
PIPE_CLOSED = 141
"""Exit code after the reader of stdout has closed it, as a shell reports SIGPIPE."""


_CONTROL = re.compile(r"[\x00-\x08\x0b-\x1f\x7f-\x9f]")
_COLOUR = re.compile(r"(\x1b\[[0-9;]*m|\r)")


class OutputLost(BaseException):
    """Standard output cannot be written. Not an Exception, so that no handler mistakes it for an error of the
    work."""

    def __init__(self, error: OSError) -> None:
        super().__init__(error)
        self.exit_code = PIPE_CLOSED if error.errno == errno.EPIPE else EXIT_CODE
        self.problems: tuple[Problem, ...] = ()
        """Empty if the reader has closed the pipe, as in `… | head`."""
        if error.errno != errno.EPIPE:
            remedy = "redirect it to a writable location"
            self.problems = (Problem("standard output", f"{error.strerror}", remedy=remedy),)


class _Stream(io.FileIO):
    """A raw standard stream of this process."""

    is_needed = False
    """Whether a failed write raises OutputLost."""

    def write(self, data: Any, /) -> int:
        try:
            # None: another program made the stream non-blocking, and it is full.
            while (written := super().write(data)) is None:
                select.select([], [self], [])
            return written
        except OSError as error:
            if self.is_needed:
                # Discard the contents of buffers.
                _open_nowhere(self.fileno())
                raise OutputLost(error) from None
            return memoryview(data).nbytes


class _Text(io.TextIOWrapper):
    """A standard text stream of this process."""

    may_colour = False
    """Whether to pass color codes and carriage returns through, both of which libraries write to stderr."""

    def write(self, text: str, /) -> int:
        if self.may_colour:
            parts = _COLOUR.split(text)
            super().write("".join(part if i % 2 else escape_controls(part) for i, part in enumerate(parts)))
        else:
            super().write(escape_controls(text))
        return len(text)


class _Unescaped:
    """A standard stream without escaping, for code that controls the terminal and escapes foreign text
    itself."""

    def __init__(self, stream: _Text) -> None:
        self._stream = stream

    def write(self, text: str, /) -> int:
        return io.TextIOWrapper.write(self._stream, text)

    def __getattr__(self, name: str) -> Any:
        return getattr(self._stream, name)


def escape_controls(text: str) -> str:
    """Return `text` with control characters, except line ends and tabs, as backslash escapes."""
    return _CONTROL.sub(lambda found: found[0].encode("unicode_escape").decode(), text)


def print_note(text: str) -> None:
    """Print a message to stderr, without control characters and credentials."""
    print(clean(text), file=sys.stderr, flush=True)


def clean(text: str) -> str:
    """Return `text` without control characters and credentials in URLs, for messages with names from foreign
    files."""
    return escape_controls(without_credentials(text))


def unescaped(stream: TextIO) -> TextIO:
    """Return a version of `stream` without escaping, for progress bars and live lines."""
    return cast(TextIO, _Unescaped(stream)) if isinstance(stream, _Text) else stream


def print_text(text: str) -> None:
    """Print requested text to stdout, unchanged unless stdout is a terminal."""
    print(text, file=sys.stdout if sys.stdout.isatty() else unescaped(sys.stdout), flush=True)


_output: _Stream | None = None


def replace_streams() -> None:
    """Replace the standard streams. Call this before any file is opened, which would get the number of a
    closed stream."""
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


def tolerate_lost_output() -> None:
    """Continue from now on if stdout cannot be written: the output only reports on the work."""
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
    is_buffered = isinstance(like.buffer, io.BufferedIOBase)  # false with python -u
    return _Text(
        io.BufferedWriter(raw) if is_buffered else raw,
        like.encoding,
        like.errors,
        line_buffering=bool(like.line_buffering),
        write_through=not is_buffered,
    )
