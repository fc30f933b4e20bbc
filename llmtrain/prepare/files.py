"""Write markers of finished work atomically, and report full disks and unwritable folders as user errors."""

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
    """Write JSON that marks a unit of work as finished. The file appears complete, but is not synced to disk:
    readers also check the sizes of the files that it names."""
    temporary = path.with_name(f".{path.name}.tmp")
    temporary.write_text(json.dumps(value))
    os.replace(temporary, path)


@contextmanager
def disk_errors(folder: Path, bytes_needed: int) -> Iterator[None]:
    """Turn errors of a full disk or an unwritable folder into a DataError that names the path.

    bytes_needed: estimate of the disk space that the job needs.
    """
    try:
        yield
    except OSError as error:
        if not is_disk_full(error) and error.errno not in NOT_WRITABLE:
            raise
        needed = f"about {bytes_needed:,} bytes for the job" if is_disk_full(error) else "a folder"
        remedy = "free disk space, then run the same command again: finished work is kept"
        where = Path(error.filename or folder)
        raise DataError(disk_problem(error, where, allowed=needed, if_full=remedy)) from error
