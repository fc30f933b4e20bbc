"""Lock the output folder of prepare, manage the unfinished work in it, and move the finished corpus in
place."""

from __future__ import annotations

import json
import os
import shutil
import stat
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

from llmtrain.corpus.manifest import MANIFEST_NAME, STAMP_NAME, UNFINISHED_NAME
from llmtrain.errors import DataError, Problem, UserError
from llmtrain.files import lock, sync_folder, write_json_atomically
from llmtrain.prepare import peers as peer_files
from llmtrain.prepare.encode import SPLITS
from llmtrain.prepare.peers import Peers
from llmtrain.prepare.report import Progress
from llmtrain.tokenizers.base import TOKENIZER_FILES


@contextmanager
def locked_output(output: Path, peers: Peers) -> Iterator[None]:
    """Hold the lock of the output folder, so that only one job works in it at a time: exclusively for a
    single process, shared for several processes once they have met."""
    made = not output.exists()
    descriptor = None
    try:
        if peers.rank == 0:
            descriptor = _open_output(output)
            _lock(descriptor, output)
            _refuse_taken(output)
        _refuse_others_work(output / UNFINISHED_NAME, may_remove=peers.rank == 0)
        if peers.size > 1:
            if descriptor is not None:
                _make_work(output / UNFINISHED_NAME)
                _lock(descriptor, output, shared=True)
            peers.meet()
            if descriptor is None:
                descriptor = _open_output(output)
                _lock(descriptor, output, shared=True)
        yield
    except BaseException as error:
        unexpected = DataError(Problem(f"rank {peers.rank}", f"an unexpected end ({type(error).__name__})"))
        peers.leave(error if isinstance(error, UserError) else unexpected)
        raise
    finally:
        if descriptor is not None:
            os.close(descriptor)
        if made and peers.rank == 0:
            with suppress(OSError):
                output.rmdir()  # succeeds only if the folder is empty


def _open_output(output: Path) -> int:
    try:
        output.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        got = f"a folder that cannot be created ({error.strerror})"
        raise DataError(Problem(str(output), got, "", "choose another output")) from error
    return os.open(output, os.O_RDONLY)


def _lock(descriptor: int, output: Path, shared: bool = False) -> None:
    try:
        lock(descriptor, output, shared)
    except BlockingIOError as error:
        got = "a folder in which another prepare is running"
        raise DataError(Problem(str(output), got, "", "wait for it to end")) from error


def _refuse_taken(output: Path) -> None:
    """Raise DataError if the folder holds something other than a corpus or unfinished work."""
    taken = [name for name in (*SPLITS, *TOKENIZER_FILES) if (output / name).exists()]
    if taken and not (output / MANIFEST_NAME).exists() and not (output / UNFINISHED_NAME).exists():
        got = f"a folder that holds {', '.join(taken)} but no corpus"
        raise DataError(Problem(str(output), got, "an empty or new folder", "choose another output"))


def _refuse_others_work(work: Path, may_remove: bool = True) -> None:
    """Raise DataError if the folder of unfinished work belongs to another user, who could plant links in it
    that make this process overwrite other files.

    may_remove: remove an own folder in which others may write, as earlier versions made it.
    """
    try:
        status = os.lstat(work)
    except FileNotFoundError:
        return
    # Some file systems have no owners or modes: compare with a new folder.
    new = Path(tempfile.mkdtemp(prefix=".", dir=work.parent))
    own = os.lstat(new)
    new.rmdir()
    if not stat.S_ISDIR(status.st_mode) or status.st_uid != own.st_uid:
        got = "a link" if stat.S_ISLNK(status.st_mode) else "something that is not a folder of this user"
        allowed = "unfinished work of this user"
        raise DataError(Problem(str(work), got, allowed, "remove it, or choose another output"))
    more = status.st_mode & ~own.st_mode
    if may_remove and more & (stat.S_IWGRP | stat.S_IWOTH):
        shutil.rmtree(work)
    elif may_remove and more & (stat.S_IRWXG | stat.S_IRWXO):
        work.chmod(stat.S_IRWXU)


def _make_work(work: Path) -> None:
    """Create the folder of unfinished work, accessible to this user only, unless it exists."""
    _refuse_others_work(work)
    if not os.path.lexists(work):
        work.mkdir(stat.S_IRWXU)


def open_work(work: Path, request: dict[str, Any], progress: Progress) -> None:
    """Create the folder of unfinished work, or empty it if it belongs to another request."""
    _make_work(work)
    path = work / "request.json"
    if path.exists() and json.loads(path.read_text()) == request:
        progress.say(f"continuing the unfinished work in {work}")
        return
    _empty(work)
    write_json_atomically(path, request)


def _empty(work: Path) -> None:
    """Remove everything in `work` except the files of the peers; the request goes first, so that no later run
    continues with the rest."""
    (work / "request.json").unlink(missing_ok=True)
    for entry in work.iterdir():
        if entry.name != peer_files.FOLDER:
            shutil.rmtree(entry) if entry.is_dir() else entry.unlink()


def remove_work(work: Path) -> None:
    """Remove the folder of unfinished work. Files that a slow process still writes there are left to the next
    run."""
    _empty(work)
    shutil.rmtree(work, ignore_errors=True)


@contextmanager
def tidied(work: Path, peers: Peers) -> Iterator[None]:
    """Remove the folder of unfinished work if a user error ends a single process before any unit is
    finished."""
    try:
        yield
    except UserError:
        if peers.size == 1 and not any(work.glob("read/*/*.hashes.npy")):
            remove_work(work)
        raise


def commit(work: Path, output: Path) -> None:
    """Move the finished corpus into the output folder, its manifest last. May be interrupted at any time and
    called again."""
    for name in (MANIFEST_NAME, STAMP_NAME):
        (output / name).unlink(missing_ok=True)
    if any((work / "corpus" / name).exists() for name in TOKENIZER_FILES):
        for name in TOKENIZER_FILES:
            # A replaced corpus may have a tokenizer file of the other kind.
            (output / name).unlink(missing_ok=True)
    for name in (*SPLITS, *TOKENIZER_FILES):
        made, target = work / "corpus" / name, output / name
        if not made.exists():
            continue
        if target.is_dir():
            shutil.rmtree(target)
        os.replace(made, target)
    sync_folder(output)
    os.replace(work / MANIFEST_NAME, output / MANIFEST_NAME)
    sync_folder(output)
