"""Files written whole or not at all, and a full disk told as a user's error."""

from __future__ import annotations

import errno
import json
import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import IO, Any

from llmtrain.errors import DataError, Problem

NO_SPACE = {errno.ENOSPC, errno.EDQUOT, errno.EFBIG}


@contextmanager
def atomic_writer(path: Path, durable: bool = True) -> Iterator[IO[bytes]]:
    """A binary file that takes its name only when the block ends without an error.

    `durable` also forces it to the disk first, so that it survives a power failure.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        with open(temporary, "wb") as file:
            yield file
            file.flush()
            if durable:
                os.fsync(file.fileno())
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)
    if durable:
        sync_folder(path.parent)


def sync_folder(folder: Path) -> None:
    """Force the names in `folder` to the disk."""
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def write_json(path: Path, value: Any, durable: bool = True) -> None:
    with atomic_writer(path, durable) as file:
        file.write((json.dumps(value, indent=2, ensure_ascii=False) + "\n").encode())


@contextmanager
def disk_errors(folder: Path, bytes_needed: int | None = None) -> Iterator[None]:
    """Turn a full disk and an unwritable folder into a DataError that names the path.

    `bytes_needed` estimates what the whole work takes on that disk.
    """
    try:
        yield
    except OSError as error:
        where = str(error.filename or folder)
        if error.errno in NO_SPACE:
            needed = "" if bytes_needed is None else f"about {bytes_needed:,} bytes in all"
            remedy = "free some space and run the same command again: finished work is kept"
            raise DataError(Problem(where, f"a full disk ({error.strerror})", needed, remedy)) from error
        if isinstance(error, (PermissionError, NotADirectoryError)) or error.errno == errno.EROFS:
            raise DataError(
                Problem(where, f"{error.strerror}", "a folder that can be written", "choose another output")
            ) from error
        raise
