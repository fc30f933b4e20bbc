"""Files that are whole or not there: temporary name, fsync, rename; checksums; and why a disk refuses."""

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
    errno.EACCES: "permit writing there, or choose another place",
    errno.EPERM: "permit writing there, or choose another place",
    errno.EROFS: "choose another place",
    errno.ENOTDIR: "a file stands where its folder should be: choose another place",
    errno.EEXIST: "a file stands where its folder should be: choose another place",
    errno.EISDIR: "name a file",
    errno.ENOENT: "make its folder first",
    errno.ELOOP: "a link stands there, which may lead anywhere: remove it",
}
"""What to do about each way in which a place refuses to be written."""
_KINDS = {
    stat.S_IFDIR: "a folder",
    stat.S_IFIFO: "a pipe",
    stat.S_IFCHR: "a device",
    stat.S_IFBLK: "a device",
    stat.S_IFSOCK: "a socket",
}


def write_atomically(path: Path, content: bytes | str) -> None:
    """Replace the file at `path` by `content`: a reader sees the old file or the new one, never a part."""
    with atomic_writer(path) as file:
        file.write(content.encode() if isinstance(content, str) else content)


@contextmanager
def atomic_writer(path: Path) -> Iterator[IO[bytes]]:
    """A binary file that takes its name, safe on the disk, when the block ends without an error.

    Until then it has a name that nobody can foresee: in a folder of others, a link may wait behind any other.
    """
    temporary = path.with_name(f".{path.name}.{secrets.token_hex(6)}.tmp")
    try:
        with open(temporary, "xb", opener=beside_no_link) as file:
            yield file
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
    except BaseException:
        temporary.unlink(missing_ok=True)
        raise
    sync_folder(path.parent)


def open_no_link(path: Path, mode: str) -> IO[str]:
    """`open` of a text file that is not behind a link. Raise OSError (ELOOP) for one that is."""
    return open(path, mode, opener=beside_no_link, encoding="utf-8")


def beside_no_link(path: str, flags: int) -> int:
    """Open what is not behind a link; an `opener` of `open`."""
    return os.open(path, flags | os.O_NOFOLLOW, 0o666)


def open_regular(path: str | Path, flags: int = os.O_RDONLY) -> int:
    """Open a file, never a pipe or a device, which could hang, be endless, or do something; an `opener` of
    `open`. A link is followed: stores of models are made of links.

    Raise OSError (EINVAL) for what is no file.
    """
    # Not to wait for who writes to a pipe, nor take over a terminal.
    descriptor = os.open(path, flags | os.O_NONBLOCK | os.O_NOCTTY | os.O_CLOEXEC)
    kind = stat.S_IFMT(os.fstat(descriptor).st_mode)
    if kind != stat.S_IFREG:
        os.close(descriptor)
        raise OSError(errno.EINVAL, f"{_KINDS.get(kind, 'something else')}, not a file", str(path))
    return descriptor


def at_home(path: str | Path) -> Path:
    """Return `path` with the user's home for its `~`. Path.expanduser raises for a user that is not known."""
    return Path(os.path.expanduser(path))


def stays_inside(name: object) -> bool:
    """Return whether `name`, from a manifest, is a relative path without `..`: then the file lies in the
    manifest's folder."""
    return (
        isinstance(name, str)
        and name.isprintable()
        and all(part not in ("", ".", "..") for part in name.split("/"))
    )


def links_out_of(folder: Path) -> list[Path]:
    """The entries of `folder`, a level deep, that are links to places outside of it."""
    inside = folder.resolve()
    return [
        entry for entry in sorted(folder.iterdir()) if entry.is_symlink() and not _leads_into(entry, inside)
    ]


def _leads_into(link: Path, inside: Path) -> bool:
    try:
        return link.resolve().is_relative_to(inside)
    except RuntimeError:  # of links that lead to each other
        return False


def write_json_atomically(path: Path, value: Any, indent: int | None = 1) -> None:
    """`value` as JSON at `path`, whole or not at all. Without `indent` it takes a tenth of the time."""
    text = json.dumps(value, indent=indent, ensure_ascii=False) + "\n"
    # Names of files need not be UTF-8: what Python holds them as, JSON has a spelling for.
    write_atomically(path, text.encode("utf-8", "backslashreplace"))


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


def lock(file: IO[str] | int, path: Path, shared: bool = False) -> None:
    """Hold the open `file` alone, or with others that hold it `shared`, until it is closed, or the process
    ends, however it ends. Held already, it changes from the one to the other.

    Raise BlockingIOError if another process holds it otherwise. A file system without locks gets a
    warning, with `path`, and no lock.
    """
    try:
        fcntl.flock(file, (fcntl.LOCK_SH if shared else fcntl.LOCK_EX) | fcntl.LOCK_NB)
    except BlockingIOError:
        raise
    except OSError as error:
        logger.warning(
            "%s cannot be locked (%s): make sure that nothing else works there", path, error.strerror
        )


def stamp_of(status: os.stat_result) -> tuple[int, ...]:
    """What tells a file that was found good from a changed one; ctime also moves when mtime is set back."""
    return status.st_size, status.st_mtime_ns, status.st_ctime_ns


def checksum(path: Path) -> str:
    """xxh3-128 of the file's content, in hex."""
    digest = xxhash.xxh3_128()
    with open(path, "rb", opener=open_regular) as file:
        while chunk := file.read(CHUNK_BYTES):
            digest.update(chunk)
    return digest.hexdigest()


def checksum_of_json(content: Mapping[str, Any]) -> str:
    """xxh3-128 of what a JSON object says, in hex, its own key `checksum` left out."""
    body = {key: value for key, value in content.items() if key != "checksum"}
    return xxhash.xxh3_128_hexdigest(json.dumps(body, sort_keys=True).encode())


def is_disk_full(error: BaseException) -> bool:
    """Whether `error` says that no space or no quota is left, or that a file may not grow so large;
    libraries in other languages report it in their text only."""
    if isinstance(error, OSError) and error.errno in FULL:
        return True
    return "No space left on device" in str(error) or "os error 28" in str(error)


def disk_problem(
    error: Exception,
    path: Path,
    *,
    key: str = "",
    allowed: str = "",
    if_full: str = "make room, then try again",
) -> Problem:
    """Why `path` could not be written, in one line: what happened, the space left on that disk, a remedy.

    key: the config key that gave the path. allowed: what may stand there, or how much space it takes.
    if_full: what to do about a full disk.
    """
    where = f"{key}={path}" if key else str(path)
    reason = error.strerror if isinstance(error, OSError) and error.strerror else str(error)
    if is_disk_full(error):
        got = f"a full disk ({reason}, {_free_bytes(path) / 2**20:,.0f} MiB free)"
        return Problem(where, got, allowed, if_full)
    remedy = UNWRITABLE.get(getattr(error, "errno", None) or 0, "choose another place")
    return Problem(where, f"a place that cannot be written ({reason})", allowed, remedy)


def _free_bytes(path: Path) -> int:
    """On the disk of `path`, which need not exist yet."""
    existing = next(folder for folder in [path, *path.absolute().parents] if folder.exists())
    return shutil.disk_usage(existing).free
