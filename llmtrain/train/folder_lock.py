"""The lock of a run folder: one process at a time, on whatever host.

The kernel's lock is free as soon as its holder has ended. But some network file systems have none, and some
keep it to one host. So the holder also renews the time of the file, and who finds another host's name in it
watches for a while whether it is renewed. Where several hosts may write at once, each reads again what it
wrote.
"""

from __future__ import annotations

import os
import platform
import re
import stat
import tempfile
import threading
import time
from pathlib import Path
from typing import IO

from llmtrain import files
from llmtrain.errors import CheckpointError, Problem

LOCK = ".lock"
RENEW_SECONDS = 10.0
WATCH_SECONDS = 25.0
"""A note of another host that is not renewed for so long is of a process that has ended."""
OLD_SECONDS = 120.0
"""A note that is older needs no watching."""
SETTLE_SECONDS = 2.0
"""How long a host that starts at once may take to write its note, where the lock tells nothing of it."""
NETWORK = re.compile(r"nfs|lustre|cifs|smb|beegfs|gpfs|ceph|gluster|afs|fuse\.")
"""How the names of file systems begin whose locks may end at the host."""
_NOTE = re.compile(r"process (\d+) on (.+)")


class FolderLock:
    """An exclusive lock on a folder, until close() or the end of the process, however it ends."""

    def __init__(self, folder: Path) -> None:
        """Lock the folder. Raise CheckpointError if another process holds it, or its lock is no plain file;
        OSError if it cannot be written."""
        self._path = folder / LOCK
        self._file: IO[str] = files.open_no_follow(self._path, "a+")
        try:
            self._refuse_strange_file()
            self._lock(folder)
            self._refuse_other_host(folder)
            self._take(folder)
        except BaseException:
            self._file.close()
            raise
        self._is_over = threading.Event()
        threading.Thread(target=self._renew, name="run folder", daemon=True).start()

    def close(self) -> None:
        """Release the folder."""
        if not self._file.closed:
            self._is_over.set()
            self._file.truncate(0)
            self._file.close()

    def _refuse_strange_file(self) -> None:
        status = os.fstat(self._file.fileno())
        if not stat.S_ISREG(status.st_mode) or status.st_nlink > 1:
            got = "a file with another name, or with none"
            raise CheckpointError(Problem(str(self._path), got, "a file of the run's own", "remove it"))

    def _lock(self, folder: Path) -> None:
        try:
            try:
                self._is_locked = files.lock(self._file, folder)
            except BlockingIOError:
                # `llmtrain status` tries the lock for a moment.
                time.sleep(0.2)
                self._is_locked = files.lock(self._file, folder)
        except BlockingIOError:
            raise _refusal(folder, self._note() or "another process") from None

    def _note(self) -> str:
        return os.pread(self._file.fileno(), 200, 0).decode(errors="replace").strip()

    def _refuse_other_host(self, folder: Path) -> None:
        """Raise CheckpointError if a process of another host, which the lock did not tell of, renews its
        note."""
        note = self._note()
        found = _NOTE.fullmatch(note)
        if found is None or found[2] == platform.node():
            return  # on this host the lock is to be trusted
        renewed = _changed(self._path)
        if _now(folder) - renewed > OLD_SECONDS:
            return
        deadline = time.monotonic() + WATCH_SECONDS
        while time.monotonic() < deadline:
            time.sleep(min(1.0, WATCH_SECONDS / 10))
            if _changed(self._path) != renewed:
                raise _refusal(folder, note)

    def _take(self, folder: Path) -> None:
        """Write the note of this process. Raise CheckpointError if another host, which started at once, wrote
        its own."""
        own = f"process {os.getpid()} on {platform.node()}"
        self._file.truncate(0)
        self._file.write(own)
        self._file.flush()
        if self._is_locked and not NETWORK.match(_file_system(folder)):
            return
        os.fsync(self._file.fileno())
        time.sleep(SETTLE_SECONDS)
        with open(self._path, "rb", opener=files.open_regular) as file:
            found = file.read(200).decode(errors="replace").strip()
        if found != own:
            raise _refusal(folder, found or "another process")

    def _renew(self) -> None:
        while not self._is_over.wait(RENEW_SECONDS):
            try:
                os.utime(self._file.fileno())
            except (OSError, ValueError):  # closed meanwhile; or a failing disk, which saves will tell of
                continue


def _refusal(folder: Path, holder: str) -> CheckpointError:
    allowed, remedy = "a folder no run uses", "wait for it or stop it"
    return CheckpointError(Problem("run.dir", f"{folder}, in use by {holder}", allowed, remedy))


def _changed(path: Path) -> float:
    """Return when a file was last changed. It is opened, or a network file system might tell what it knew."""
    with open(path, "rb", opener=files.open_regular) as file:
        return os.fstat(file.fileno()).st_mtime


def _now(folder: Path) -> float:
    """Return the time by the clock of the file system, as a new file in the folder has it: that of this host
    may differ."""
    with tempfile.TemporaryFile(dir=folder) as file:
        return os.fstat(file.fileno()).st_mtime


def _file_system(folder: Path) -> str:
    """Return the name of the file system of a folder, "" if it is unknown."""
    import psutil

    place = folder.resolve()
    mounts = {Path(mount.mountpoint): mount.fstype for mount in psutil.disk_partitions(all=True)}
    return next((mounts[path] for path in (place, *place.parents) if path in mounts), "")
