"""Write files atomically (temporary name, fsync, rename), open them safely, lock and checksum them, and
describe disk errors."""

from __future__ import annotations

import errno
import fcntl
import json
import logging
import os
import secrets
import shutil
import stat
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import IO, Any

import xxhash

from llmtrain.errors import Problem

CHUNK_BYTES = 2**22
logger = logging.getLogger(__name__)

FULL = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)
UNWRITABLE = {
    errno.EACCES: "permit writing there, or choose another location",
    errno.EPERM: "permit writing there, or choose another location",
    errno.EROFS: "choose another location",
    errno.ENOTDIR: "a file is in place of its folder: choose another location",
    errno.EEXIST: "a file is in place of its folder: choose another location",
    errno.EISDIR: "name a file",
    errno.ENOENT: "create its folder first",
    errno.ELOOP: "it is a link, which may point anywhere: remove it",
}
"""Remedies for errors of writing to a location."""
_KINDS = {
    stat.S_IFDIR: "a folder",
    stat.S_IFIFO: "a pipe",
    stat.S_IFCHR: "a device",
    stat.S_IFBLK: "a device",
    stat.S_IFSOCK: "a socket",
}


def write_atomically(path: Path, content: bytes | str) -> None:
    """Replace the file at `path` by `content`. Readers see the old or the new file, never a part."""
    with atomic_writer(path) as file:
        file.write(content.encode() if isinstance(content, str) else content)


@contextmanager
def atomic_writer(path: Path) -> Iterator[IO[bytes]]:
    """Yield a binary file that is synced and renamed to `path` if the block ends without an error.

    Until then it has a random name: in a folder that others can write to, a link may exist under any
    predictable name.
    """
    temporary = path.with_name(f".{path.name}.{secrets.token_hex(6)}.tmp")
    try:
        with open(temporary, "xb", opener=no_follow_opener) as file:
            yield file
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
    except BaseException:
        temporary.unlink(missing_ok=True)
        raise
    sync_folder(path.parent)


def open_no_follow(path: Path, mode: str) -> IO[str]:
    """Open a text file. Raise OSError (ELOOP) if `path` is a link."""
    return open(path, mode, opener=no_follow_opener, encoding="utf-8")


def no_follow_opener(path: str, flags: int) -> int:
    """An `opener` for `open` that rejects links."""
    return os.open(path, flags | os.O_NOFOLLOW, 0o666)


def open_regular(path: str | Path, flags: int = os.O_RDONLY) -> int:
    """An `opener` for `open` that accepts regular files only: pipes and devices could block, be endless or
    have side effects. Links are followed, because model stores consist of links.

    Raise OSError (EINVAL) if `path` is not a regular file.
    """
    # Do not wait for the writer of a pipe, and do not acquire a controlling terminal.
    descriptor = os.open(path, flags | os.O_NONBLOCK | os.O_NOCTTY | os.O_CLOEXEC)
    kind = stat.S_IFMT(os.fstat(descriptor).st_mode)
    if kind != stat.S_IFREG:
        os.close(descriptor)
        raise OSError(errno.EINVAL, f"{_KINDS.get(kind, 'something else')}, not a file", str(path))
    return descriptor


def expand_home(path: str | Path) -> Path:
    """Expand `~` in `path`. Unlike Path.expanduser, do not raise for an unknown user."""
    return Path(os.path.expanduser(path))


def is_inside_path(name: object) -> bool:
    """Return whether `name`, from a manifest, is a relative path without `..`, so that the file is in the
    folder of the manifest."""
    return (
        isinstance(name, str)
        and name.isprintable()
        and all(part not in ("", ".", "..") for part in name.split("/"))
    )


def outward_links(folder: Path) -> list[Path]:
    """Return the direct entries of `folder` that are links to locations outside of it."""
    inside = folder.resolve()
    return [
        entry for entry in sorted(folder.iterdir()) if entry.is_symlink() and not _leads_into(entry, inside)
    ]


def _leads_into(link: Path, inside: Path) -> bool:
    try:
        return link.resolve().is_relative_to(inside)
    except RuntimeError:  # a cycle of links
        return False


def write_json_atomically(path: Path, value: Any, indent: int | None = 1) -> None:
    """Write `value` as JSON to `path`, atomically. Without `indent` it takes a tenth of the time."""
    text = json.dumps(value, indent=indent, ensure_ascii=False) + "\n"
    # File names need not be UTF-8: write the surrogate escapes of Python as JSON escapes.
    write_atomically(path, text.encode("utf-8", "backslashreplace"))


def sync(path: Path) -> None:
    """Flush the contents of a file to disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def sync_folder(path: Path) -> None:
    """Flush the entries of a folder (new names and renames) to disk."""
    sync(path)


def replace_folder(partial: Path, output: Path) -> None:
    """Give a finished folder its name; one that had it before is removed."""
    sync_folder(partial)
    replaced = output.with_name(f".{output.name}.{os.getpid()}.replaced")
    if output.exists():
        os.rename(output, replaced)
    os.rename(partial, output)
    sync_folder(output.parent)
    shutil.rmtree(replaced, ignore_errors=True)


def lock(file: IO[str] | int, path: Path, shared: bool = False) -> bool:
    """Lock the open `file`, exclusively or `shared`, until it is closed or the process ends. Locking it again
    converts the lock. Return whether the file system supports locks.

    path: name of the file in the warning that is logged if the file system does not support locks.
    Raise BlockingIOError if another process holds a conflicting lock.
    """
    try:
        fcntl.flock(file, (fcntl.LOCK_SH if shared else fcntl.LOCK_EX) | fcntl.LOCK_NB)
    except BlockingIOError:
        raise
    except OSError as error:
        logger.warning(
            "%s cannot be locked (%s): make sure that no other process uses it", path, error.strerror
        )
        return False
    return True


def stamp_of(status: os.stat_result) -> tuple[int, ...]:
    """Return (size, mtime, ctime), by which a later change of the file is detected; ctime changes even if
    mtime is set back."""
    return status.st_size, status.st_mtime_ns, status.st_ctime_ns


def checksum(path: Path) -> str:
    """Return the xxh3-128 of the contents of a file, in hex."""
    digest = xxhash.xxh3_128()
    with open(path, "rb", opener=open_regular) as file:
        while chunk := file.read(CHUNK_BYTES):
            digest.update(chunk)
    return digest.hexdigest()


def checksum_of_json(content: Mapping[str, Any]) -> str:
    """Return the xxh3-128 of a JSON object without its key `checksum`, in hex."""
    body = {key: value for key, value in content.items() if key != "checksum"}
    return xxhash.xxh3_128_hexdigest(json.dumps(body, sort_keys=True).encode())


def is_disk_full(error: BaseException) -> bool:
    """Return whether `error` reports a full disk, an exceeded quota or a file size limit. Libraries in other
    languages report it in their text only."""
    if isinstance(error, OSError) and error.errno in FULL:
        return True
    return "No space left on device" in str(error) or "os error 28" in str(error)


def disk_problem(
    error: Exception,
    path: Path,
    *,
    key: str = "",
    allowed: str = "",
    if_full: str = "free disk space, then try again",
) -> Problem:
    """Return the problem that `path` could not be written.

    key: config key of the path. allowed: what may be there, or the space that is needed. if_full: remedy for
    a full disk.
    """
    where = f"{key}={path}" if key else str(path)
    reason = error.strerror if isinstance(error, OSError) and error.strerror else str(error)
    if is_disk_full(error):
        got = f"a full disk ({reason}, {_free_bytes(path) / 2**20:,.0f} MiB free)"
        return Problem(where, got, allowed, if_full)
    remedy = UNWRITABLE.get(getattr(error, "errno", None) or 0, "choose another location")
    return Problem(where, f"a location that is not writable ({reason})", allowed, remedy)


def _free_bytes(path: Path) -> int:
    """Return the free bytes on the disk of `path`, which need not exist yet."""
    existing = next(folder for folder in [path, *path.absolute().parents] if folder.exists())
    return shutil.disk_usage(existing).free
