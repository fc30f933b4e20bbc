"""Source files at URLs: look them up, and download each while its unit is read."""

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
from llmtrain.prepare.decompress import refuse_changed
from llmtrain.prepare.source_file import Part, SourceFile
from llmtrain.urls import without_credentials


def file_name(url: str) -> str:
    """Return the last component of the URL's path, unquoted."""
    return unquote(urlsplit(url).path).rstrip("/").rpartition("/")[2]


def find(url: str, kind: str, compression: str) -> SourceFile:
    """Return the file at `url`. Raise DataError if it is missing or unreadable."""
    transport = Transport()
    try:
        size, version = transport.describe(url)
    except TarFileError as error:
        # The remedies of the error are those for a file of a corpus.
        raise DataError(replace(p, allowed="", remedy="check the URL") for p in error.problems) from error
    finally:
        transport.close()
    name = without_credentials(url)
    if size is None:
        got = "a file of unknown size: the server does not report it"
        raise DataError(Problem(name, got, "", "download the file, and give its path"))
    return SourceFile(Path(file_name(url)), name, kind, compression, size, 0, url, version)


@contextmanager
def local_copy(part: Part, scratch: Path) -> Iterator[Part]:
    """Yield the part with its file on this machine; a remote file is downloaded to `scratch` and then
    removed.

    Raise DataError if the download fails, or the file has changed since it was found, until the block ends.
    """
    if not part.file.url:
        _refuse_changed(part)
        try:
            yield part
        except DataError:
            # A change of the file explains the error better.
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
