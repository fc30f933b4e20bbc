"""The output folder of prepare: who may work in it, the unfinished work, and how it becomes the corpus."""

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
    """Only one job at a time works in an output folder: its single process holds the folder's lock alone,
    several hold it shared once they have met."""
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
                output.rmdir()  # where nothing is in it


def _open_output(output: Path) -> int:
    try:
        output.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        got = f"a place where no folder can be made ({error.strerror})"
        raise DataError(Problem(str(output), got, "", "choose another output")) from error
    return os.open(output, os.O_RDONLY)


def _lock(descriptor: int, output: Path, shared: bool = False) -> None:
    try:
        lock(descriptor, output, shared)
    except BlockingIOError as error:
        got = "a folder in which another prepare is at work"
        raise DataError(Problem(str(output), got, "", "wait for it to end")) from error


def _refuse_taken(output: Path) -> None:
    """Raise DataError when something else than a corpus or unfinished work stands there."""
    taken = [name for name in (*SPLITS, *TOKENIZER_FILES) if (output / name).exists()]
    if taken and not (output / MANIFEST_NAME).exists() and not (output / UNFINISHED_NAME).exists():
        got = f"a folder that holds {', '.join(taken)} but no corpus"
        raise DataError(Problem(str(output), got, "an empty or new folder", "choose another output"))


def _refuse_others_work(work: Path, may_remove: bool = True) -> None:
    """Raise DataError for unfinished work that is not this user's own: who may write there can let any name
    in it lead to another file of the user, which is then written over. Work of earlier versions, in which
    others may write, goes."""
    try:
        status = os.lstat(work)
    except FileNotFoundError:
        return
    # Some file systems know no owners, or no modes: what a new folder is told to be says so.
    new = Path(tempfile.mkdtemp(prefix=".", dir=work.parent))
    own = os.lstat(new)
    new.rmdir()
    if not stat.S_ISDIR(status.st_mode) or status.st_uid != own.st_uid:
        got = "a link" if stat.S_ISLNK(status.st_mode) else "what is no folder of this user"
        allowed = "unfinished work of this user"
        raise DataError(Problem(str(work), got, allowed, "remove it, or choose another output"))
    more = status.st_mode & ~own.st_mode
    if may_remove and more & (stat.S_IWGRP | stat.S_IWOTH):
        shutil.rmtree(work)
    elif may_remove and more & (stat.S_IRWXG | stat.S_IRWXO):
        work.chmod(stat.S_IRWXU)


def _make_work(work: Path) -> None:
    """Make the folder of unfinished work, for this user alone, unless there is one."""
    _refuse_others_work(work)
    if not os.path.lexists(work):
        work.mkdir(stat.S_IRWXU)


def open_work(work: Path, request: dict[str, Any], progress: Progress) -> None:
    """Make the folder of unfinished work, or empty it when it was made for another request."""
    _make_work(work)
    path = work / "request.json"
    if path.exists() and json.loads(path.read_text()) == request:
        progress.say(f"going on with the unfinished work in {work}")
        return
    _empty(work)
    write_json_atomically(path, request)


def _empty(work: Path) -> None:
    """Remove what is in `work` but for the peers' files, the request first, without which nobody goes on
    with the rest."""
    (work / "request.json").unlink(missing_ok=True)
    for entry in work.iterdir():
        if entry.name != peer_files.FOLDER:
            shutil.rmtree(entry) if entry.is_dir() else entry.unlink()


def remove_work(work: Path) -> None:
    """Remove the folder of unfinished work; the next run removes what a slow process still writes there."""
    _empty(work)
    shutil.rmtree(work, ignore_errors=True)


@contextmanager
def tidied(work: Path, peers: Peers) -> Iterator[None]:
    """Remove work in which nothing is finished when a user's error ends a process that works alone."""
    try:
        yield
    except UserError:
        if peers.size == 1 and not any(work.glob("read/*/*.hashes.npy")):
            remove_work(work)
        raise


def commit(work: Path, output: Path) -> None:
    """Put the whole corpus in its place, its manifest last; may be killed and called again at any moment."""
    for name in (MANIFEST_NAME, STAMP_NAME):
        (output / name).unlink(missing_ok=True)
    if any((work / "corpus" / name).exists() for name in TOKENIZER_FILES):
        for name in TOKENIZER_FILES:
            # A corpus that is replaced may have had one of the other kind.
            (output / name).unlink(missing_ok=True)
    for name in (*SPLITS, *TOKENIZER_FILES):
        ready, place = work / "corpus" / name, output / name
        if not ready.exists():
            continue
        if place.is_dir():
            shutil.rmtree(place)
        os.replace(ready, place)
    sync_folder(output)
    os.replace(work / MANIFEST_NAME, output / MANIFEST_NAME)
    sync_folder(output)
