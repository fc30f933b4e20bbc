"""The output file of a verb: checked before the work, written after it."""

from __future__ import annotations

import errno
import os
import tempfile
from collections.abc import Callable
from pathlib import Path

from llmtrain import files
from llmtrain.errors import ConfigError, Problem


def check_new_output(output: Path, overwrite: bool) -> None:
    """Raise ConfigError unless a file can be written there, and none is there that may not be replaced."""
    if output.exists() and not overwrite:
        got = f"{output}, which is there already"
        raise ConfigError(Problem("output", got, "a new file", "or set overwrite=true"))
    check_output(output)


def check_output(output: Path, key: str = "output") -> None:
    """Raise ConfigError unless a file can be written there. Call it before the work.

    key: the key that named it.
    """
    try:
        if output.is_dir():
            raise IsADirectoryError(errno.EISDIR, os.strerror(errno.EISDIR))
        with tempfile.TemporaryFile(dir=output.parent):
            pass
    except OSError as error:
        problem = files.disk_problem(error, output, key=key, allowed="a file in a folder that exists")
        raise ConfigError(problem) from error


def write_output(output: Path, write: Callable[[Path], None], key: str = "output") -> None:
    """Call `write(output)`. Raise ConfigError if that fails."""
    try:
        write(output)
    except OSError as error:
        raise ConfigError(files.disk_problem(error, output, key=key)) from error
