"""The folder of one host for copies of the state in memory. A launcher makes it, as it outlives the ranks
that it starts anew, and removes it when the job ends."""

from __future__ import annotations

import fcntl
import os
import shutil
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

import xxhash

from llmtrain.errors import ConfigError, Problem

MEMORY = "LLMTRAIN_MEMORY"
"""Variable by which a launcher tells its ranks the folder."""
_HOLDER = ".launcher"
"""File in the folder that the launcher keeps locked."""
_YOUNG_SECONDS = 60.0
"""A folder without that file is this young while its launcher makes it."""


@contextmanager
def memory_folder(place: Path | None, run: Path, keeps: bool = False) -> Iterator[Path | None]:
    """Yield a new folder below `place`, which ranks find in MEMORY; remove it in the end. Without a place,
    yield None.

    run: the run folder. What launchers of this run that were killed left at `place` is removed. A launcher
    that began anew (succession.py) `keeps` its folder.
    Raise ConfigError if it cannot be made.
    """
    before = Path(os.environ.pop(MEMORY, os.devnull))
    if place is None:
        yield None
        return
    prefix = f"llmtrain-memory-{xxhash.xxh3_64_hexdigest(os.fsencode(run))}-"
    try:
        if keeps and before.parent == place and before.name.startswith(prefix) and before.is_dir():
            folder = before
        else:
            folder = Path(tempfile.mkdtemp(prefix=prefix, dir=place))  # which only its owner may enter
        holder = os.open(folder / _HOLDER, os.O_WRONLY | os.O_CREAT | os.O_NOFOLLOW, 0o600)
        with suppress(OSError):  # without locks a folder that is left stays
            fcntl.flock(holder, fcntl.LOCK_EX | fcntl.LOCK_NB)
        _remove_left(place, prefix)
    except OSError as error:
        got = f"{place}, where no folder can be made ({error.strerror})"
        allowed = "a folder in memory or on a local disk"
        raise ConfigError(Problem("checkpoint.memory.dir", got, allowed, "name one of each host")) from None
    os.environ[MEMORY] = str(folder)
    _HOLDERS.append(holder)
    try:
        yield folder
    finally:
        remove_own()
        _HOLDERS.remove(holder)
        os.close(holder)


_HOLDERS: list[int] = []
"""The locked files of this process."""


def hand_on() -> None:
    """Keep the folder locked when this process goes on as another program: launchers beside it look for what
    killed ones left."""
    for holder in _HOLDERS:
        os.set_inheritable(holder, True)


def remove_own() -> None:
    """Remove the folder that MEMORY names, if it does."""
    if folder := os.environ.pop(MEMORY, ""):
        shutil.rmtree(folder, ignore_errors=True)


def empty(folder: Path | None) -> None:
    """Remove the copies in a folder: they will be older than those of hosts that go on."""
    for entry in () if folder is None else folder.iterdir():
        if entry.is_dir():
            shutil.rmtree(entry, ignore_errors=True)


def _remove_left(place: Path, prefix: str) -> None:
    """Remove the folders of this user's launchers of one run that have ended."""
    for folder in place.glob(f"{prefix}*"):
        with suppress(OSError):
            status = folder.lstat()
            if folder.is_symlink() or not folder.is_dir() or status.st_uid != os.getuid():
                continue
            if not (folder / _HOLDER).exists():
                if time.time() - status.st_mtime < _YOUNG_SECONDS:
                    continue
            elif _is_held(folder / _HOLDER):
                continue
            shutil.rmtree(folder, ignore_errors=True)


def _is_held(path: Path) -> bool:
    file = os.open(path, os.O_RDONLY | os.O_NOFOLLOW)
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return True
    finally:
        os.close(file)
    return False
