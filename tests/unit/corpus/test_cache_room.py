"""The cache keeps to its room, and says why it cannot."""

from __future__ import annotations

import errno
import threading
import time
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pytest

from llmtrain.corpus.cache_folder import RemoteFile
from llmtrain.errors import DataError
from tests.support.remote_files import FILE_SIZE, Make, content, get, held
from tests.support.servers import FileServer

pytestmark = pytest.mark.usefixtures("short_waits")


def test_an_opened_file_outlives_its_eviction(server: FileServer, files: Sequence[RemoteFile], make: Make):
    cache = make(bytes=FILE_SIZE)
    descriptor = cache.open(files[0].url, FILE_SIZE, files[0].xxh3_128)
    get(cache, files[1])
    with open(descriptor, "rb") as file:
        assert file.read() == content(server, 0)
    assert cache.counters.evictions == 1


def test_what_was_not_used_for_the_longest_time_goes(
    server: FileServer, files: Sequence[RemoteFile], make: Make, tmp_path: Path
):
    cache = make(bytes=3 * FILE_SIZE)
    for number in (0, 1, 2, 0, 3):
        assert get(cache, files[number]) == content(server, number)
    names = {path.name for path in (tmp_path / "cache").iterdir()} - {".lock"}
    kept = {files[number].name for number in (0, 2, 3)}
    assert names == kept | {f"{name}.used" for name in kept}
    assert cache.counters.evictions == 1


def test_a_smaller_bound_than_before(files: Sequence[RemoteFile], make: Make, tmp_path: Path):
    for file in files[:4]:
        get(make(), file)
    get(make(bytes=2 * FILE_SIZE + 1), files[4])
    assert held(tmp_path / "cache") == 2 * FILE_SIZE


def test_other_files_in_its_folder_stay(files: Sequence[RemoteFile], make: Make, tmp_path: Path):
    other = tmp_path / "cache" / "thesis.txt"
    other.parent.mkdir()
    other.write_bytes(bytes(2 * FILE_SIZE))
    cache = make(bytes=FILE_SIZE)
    get(cache, files[0])
    get(cache, files[1])
    assert other.exists()


def test_a_file_larger_than_the_bound(files: Sequence[RemoteFile], make: Make, server: FileServer):
    with pytest.raises(DataError, match=r"0.tar: got a file of 200,000 bytes; .*data.cache.bytes=199,999"):
        get(make(bytes=FILE_SIZE - 1), files[0])
    assert server.log == []


def test_kept_content_has_a_path(make: Make, tmp_path: Path, files: Sequence[RemoteFile]):
    cache = make(bytes=FILE_SIZE)
    path = cache.keep(b"a model", ".model")
    assert path.suffix == ".model"
    path.write_bytes(b"altered")
    assert cache.keep(b"a model", ".model") == path
    for file in files:
        get(cache, file)
    assert path.read_bytes() == b"a model"


def test_threads_in_less_room_than_they_need(
    server: FileServer, files: Sequence[RemoteFile], make: Make, tmp_path: Path
):
    """Each opens its files before they go, and never do they take more than the bound."""
    cache = make(bytes=2 * FILE_SIZE)
    wrong: list[int] = []
    most = 0

    def read(seed: int) -> None:
        for number in np.random.default_rng(seed).permutation(6).tolist():
            file = files[number]
            if get(cache, file) != content(server, number):
                wrong.append(number)

    threads = [threading.Thread(target=read, args=(seed,)) for seed in range(4)]
    for thread in threads:
        thread.start()
    while any(thread.is_alive() for thread in threads):
        sizes = []
        for path in list((tmp_path / "cache").glob("*")):
            try:
                sizes.append(path.stat().st_size)
            except FileNotFoundError:
                continue
        most = max(most, sum(sizes))
        time.sleep(0.001)
    assert not wrong
    assert held(tmp_path / "cache") <= 2 * FILE_SIZE
    assert most <= 3 * FILE_SIZE  # files that come and go between two looks are counted twice


def test_a_folder_that_cannot_be_written(files: Sequence[RemoteFile], make: Make, tmp_path: Path):
    (tmp_path / "file").touch()
    cache = make(dir=tmp_path / "file" / "cache")
    with pytest.raises(DataError, match=r"data.cache.dir=.*/file/cache: got a location that is not writable"):
        get(cache, files[0])
    with pytest.raises(DataError, match=r"data.cache.dir="):
        cache.keep(b"a")


def test_a_file_system_without_locks(
    files: Sequence[RemoteFile], make: Make, monkeypatch: pytest.MonkeyPatch
):
    def flock(descriptor: int, operation: int) -> None:
        raise OSError(errno.ENOLCK, "No locks available")

    monkeypatch.setattr("fcntl.flock", flock)
    with pytest.raises(DataError, match=r"data.cache.dir=.*: got a file system without locks") as caught:
        get(make(), files[0])
    assert "allowed: a disk of this machine" in str(caught.value)
