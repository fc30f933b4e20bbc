"""Files that are whole or not there: temporary name, fsync, rename; and checksums."""

from __future__ import annotations

import errno
import json
import os
from pathlib import Path
from typing import Any

import xxhash

CHUNK_BYTES = 2**22


def write_atomically(path: Path, content: bytes | str) -> None:
    """Replace the file at `path` by `content`: a reader sees the old file or the new one, never a part."""
    data = content.encode() if isinstance(content, str) else content
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        with open(temporary, "wb") as file:
            file.write(data)
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
    except BaseException:
        temporary.unlink(missing_ok=True)
        raise
    sync_folder(path.parent)


def write_json_atomically(path: Path, value: Any) -> None:
    """`value` as indented JSON at `path`, whole or not at all."""
    write_atomically(path, json.dumps(value, indent=1, ensure_ascii=False) + "\n")


def sync(path: Path) -> None:
    """Wait until the file's content is on the disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def sync_folder(path: Path) -> None:
    """Wait until the folder's entries are on the disk (renames and new names)."""
    sync(path)


def checksum(path: Path) -> str:
    """xxh3-128 of the file's content, in hex."""
    digest = xxhash.xxh3_128()
    with open(path, "rb") as file:
        while chunk := file.read(CHUNK_BYTES):
            digest.update(chunk)
    return digest.hexdigest()


def is_disk_full(error: BaseException) -> bool:
    """Whether `error` says that no space or no quota is left; libraries in other languages report it
    in their text only."""
    if isinstance(error, OSError) and error.errno in (errno.ENOSPC, errno.EDQUOT):
        return True
    return "No space left on device" in str(error) or "os error 28" in str(error)
