"""Large files written as a stream, whole or not at all, and a full disk told as a user's error."""

from __future__ import annotations

import errno
import json
import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from llmtrain.errors import DataError
from llmtrain.files import disk_problem, is_disk_full

NOT_WRITABLE = (errno.EACCES, errno.EPERM, errno.EROFS, errno.ENOTDIR, errno.EEXIST)


def write_marker(path: Path, value: Any) -> None:
    """JSON that marks a unit of work as finished; whole or not there, but not forced to the disk:
    whoever reads it compares the sizes of the files it speaks of."""
    temporary = path.with_name(f".{path.name}.tmp")
    temporary.write_text(json.dumps(value))
    os.replace(temporary, path)


@contextmanager
def disk_errors(folder: Path, bytes_needed: int) -> Iterator[None]:
    """Turn a full disk and an unwritable folder into a DataError that names the path.

    `bytes_needed` estimates what the whole work takes on that disk.
    """
    try:
        yield
    except OSError as error:
        if not is_disk_full(error) and error.errno not in NOT_WRITABLE:
            raise
        needed = f"about {bytes_needed:,} bytes for the whole work" if is_disk_full(error) else "a folder"
        remedy = "make room, then run the same command again: finished work is kept"
        where = Path(error.filename or folder)
        raise DataError(disk_problem(error, where, allowed=needed, if_full=remedy)) from error
