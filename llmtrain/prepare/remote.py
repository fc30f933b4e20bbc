"""Source files elsewhere: found by their URL, downloaded while the unit that holds them is read."""

from __future__ import annotations

import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from urllib.parse import unquote, urlsplit

from llmtrain.corpus.tar_files import TarFileError
from llmtrain.corpus.transport import Transport
from llmtrain.errors import DataError, Problem
from llmtrain.prepare.opening import refuse_changed
from llmtrain.prepare.streams import Part, SourceFile
from llmtrain.urls import without_credentials


def file_name(url: str) -> str:
    """The last part of the URL's path."""
    return unquote(urlsplit(url).path).rstrip("/").rpartition("/")[2]


def find(url: str, kind: str, compression: str) -> SourceFile:
    """The file of that URL. Raises DataError when it is not there or may not be read."""
    transport = Transport()
    try:
        size, version = transport.describe(url)
    except TarFileError as error:
        # It speaks of a corpus' file.
        raise DataError(replace(p, allowed="", remedy="check the URL") for p in error.problems) from error
    finally:
        transport.close()
    name = without_credentials(url)
    if size is None:
        got = "a file of unknown size: the server does not tell it"
        raise DataError(Problem(name, got, "", "download it, and give the file"))
    return SourceFile(Path(file_name(url)), name, kind, compression, size, 0, url, version)


@contextmanager
def at_hand(part: Part, scratch: Path) -> Iterator[Part]:
    """The part with its file on this machine, in `scratch` if it lies elsewhere, and gone again then.

    Raises DataError when it cannot be had, or is not the one that was found, to the end of the block.
    """
    if not part.file.url:
        _refuse_changed(part)
        try:
            yield part
        except DataError:
            # What was wrong with it may come of that.
            _refuse_changed(part)
            raise
        _refuse_changed(part)
        return
    folder = scratch / "remote"
    folder.mkdir()
    path = folder / part.file.path.name
    transport = Transport()
    try:
        if transport.describe(part.file.url) != (part.file.size, part.file.version):
            got = "another state of the file than when this run began"
            raise DataError(Problem(part.file.name, got, remedy="run the same command again"))
        transport.download(part.file.url, path, part.file.size)
        yield replace(part, file=replace(part.file, path=path, url=""))
    finally:
        transport.close()
        shutil.rmtree(folder, ignore_errors=True)


def _refuse_changed(part: Part) -> None:
    for file in part.file.files:
        refuse_changed(file)
