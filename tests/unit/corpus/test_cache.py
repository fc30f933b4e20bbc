"""Files come into the cache once, and are what the manifest says."""

from __future__ import annotations

import os
import threading
from collections.abc import Sequence
from pathlib import Path

import pytest
import xxhash

from llmtrain.config import decode
from llmtrain.corpus.cache import CacheConfig
from llmtrain.corpus.cache_folder import RemoteFile
from llmtrain.corpus.tar_files import TarFileError
from llmtrain.errors import ConfigError, DataError
from tests.support.remote_files import FILE_SIZE, Make, content, get, held
from tests.support.servers import Faults, FileServer

pytestmark = pytest.mark.usefixtures("short_waits")


def test_a_config_that_cannot_be():
    with pytest.raises(ConfigError) as caught:
        decode(CacheConfig, {"bytes": 0, "retries": -1, "timeout": 0, "downloads": 0})
    assert [problem.where for problem in caught.value.problems] == [
        "bytes",
        "retries",
        "timeout",
        "downloads",
    ]


def test_a_file_is_downloaded_once(server: FileServer, files: Sequence[RemoteFile], make: Make):
    cache = make()
    assert get(cache, files[0]) == content(server, 0)
    assert get(cache, files[0]) == content(server, 0)
    assert get(make(), files[0]) == content(server, 0)
    assert len(server.log) == 1
    assert (cache.counters.files, cache.counters.bytes) == (1, FILE_SIZE)


def test_the_same_content_elsewhere_is_the_same_file(
    server: FileServer, files: Sequence[RemoteFile], make: Make
):
    cache = make()
    get(cache, files[0])
    other = RemoteFile(f"{server.url}/nowhere", FILE_SIZE, files[0].xxh3_128)
    assert get(cache, other) == content(server, 0)


def test_a_flipped_byte_on_the_way_is_downloaded_again(
    server: FileServer, files: Sequence[RemoteFile], make: Make
):
    server.faults.flipped["0.tar"] = 1000
    before = server.content

    def once(path: str) -> bytes | None:
        found = before(path)
        server.faults.flipped.clear()
        return found

    server.content = once  # type: ignore[method-assign]
    cache = make()
    assert get(cache, files[0]) == content(server, 0)
    assert (cache.counters.files, cache.counters.bytes) == (1, 2 * FILE_SIZE)


def test_an_altered_file_is_refused_by_name(
    server: FileServer, files: Sequence[RemoteFile], make: Make, tmp_path: Path
):
    server.faults.flipped["0.tar"] = 1000
    altered = server.content("0.tar")
    assert altered is not None
    with pytest.raises(TarFileError) as caught:
        get(make(), files[0])
    message = str(caught.value)
    assert f"{server.url}/0.tar: got an altered file" in message
    assert xxhash.xxh3_128_hexdigest(altered) in message
    assert f"allowed: xxh3_128 {files[0].xxh3_128}" in message
    assert len(server.log) == 2
    assert held(tmp_path / "cache") == 0


def test_a_wrong_partial_file_is_thrown_away(
    server: FileServer, files: Sequence[RemoteFile], make: Make, tmp_path: Path
):
    (tmp_path / "cache").mkdir()
    (tmp_path / "cache" / f"{files[0].name}.partial").write_bytes(b"x" * 1000)
    assert get(make(), files[0]) == content(server, 0)
    assert server.ranges("0.tar") == ["bytes=1000-", None]


def test_a_flipped_byte_in_the_cache_is_downloaded_again(
    server: FileServer, files: Sequence[RemoteFile], make: Make, tmp_path: Path
):
    get(make(), files[0])
    path = tmp_path / "cache" / files[0].name
    times = path.stat()
    damaged = bytearray(path.read_bytes())
    damaged[777] ^= 1
    path.write_bytes(damaged)
    os.utime(path, ns=(times.st_atime_ns, times.st_mtime_ns))
    cache = make()
    assert get(cache, files[0]) == content(server, 0)
    path.write_bytes(damaged)
    assert get(cache, files[0]) == content(server, 0)
    os.truncate(path, 10)
    assert get(cache, files[0]) == content(server, 0)
    assert len(server.log) == 4


def test_data_replaced_in_place_with_the_old_time_is_not_served(
    server: FileServer, files: Sequence[RemoteFile], make: Make, tmp_path: Path
):
    cache = make()
    assert get(cache, files[0]) == content(server, 0)
    path = tmp_path / "cache" / files[0].name
    before = path.stat()
    with open(path, "r+b") as file:
        file.write(b"other data")
    os.utime(path, ns=(before.st_atime_ns, before.st_mtime_ns))
    assert get(cache, files[0]) == content(server, 0)
    assert len(server.log) == 2


def test_using_a_file_does_not_make_another_process_read_it_again(
    server: FileServer, files: Sequence[RemoteFile], make: Make, monkeypatch: pytest.MonkeyPatch
):
    caches = [make(), make()]
    for cache in caches:
        get(cache, files[0])
    monkeypatch.setattr("llmtrain.corpus.cache_folder.checksum", lambda path: pytest.fail("read again"))
    for cache in [*caches, *caches]:
        get(cache, files[0])


def test_a_missing_file_and_a_refused_one(
    server: FileServer, files: Sequence[RemoteFile], make: Make, tmp_path: Path
):
    server.faults.missing.add("0.tar")
    with pytest.raises(TarFileError, match=r"0.tar: got no such file"):
        get(make(), files[0])
    assert held(tmp_path / "cache") == 0
    server.faults = Faults(unavailable=1, status=403)
    with pytest.raises(DataError, match=r"0.tar: got access refused") as caught:
        get(make(), files[0])
    assert not isinstance(caught.value, TarFileError)
    assert get(make(), files[0]) == content(server, 0)


@pytest.mark.parametrize("checksum", ["../../secret", "0" * 31, "", "0" * 31 + "G"])
def test_a_checksum_that_is_none_never_becomes_a_path(make: Make, checksum: str, server: FileServer):
    with pytest.raises(TarFileError, match="32 hex digits"):
        get(make(), RemoteFile(f"{server.url}/0.tar", FILE_SIZE, checksum))
    assert server.log == []


def test_small_files(server: FileServer, files: Sequence[RemoteFile], make: Make):
    cache = make()
    assert cache.read_small(files[0].url, 1 << 20) == content(server, 0)
    assert cache.read_small(files[0].url, 1 << 20, files[0].xxh3_128) == content(server, 0)
    with pytest.raises(DataError, match=r"0.tar: got an altered file") as caught:
        cache.read_small(files[0].url, 1 << 20, files[1].xxh3_128)
    assert not isinstance(caught.value, TarFileError)


def test_many_threads_download_a_file_once(server: FileServer, files: Sequence[RemoteFile], make: Make):
    caches = [make(), make()]
    found: list[bytes] = []
    threads = [
        threading.Thread(target=lambda cache=cache, file=file: found.append(get(cache, file)))
        for file in files
        for cache in caches * 3
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert sorted(found) == sorted(6 * [content(server, n) for n in range(6)])
    assert len(server.log) == 6


def test_counters_of_what_went_wrong(server: FileServer, files: Sequence[RemoteFile], make: Make):
    server.faults = Faults(cuts=[1000], unavailable=1)
    cache = make()
    get(cache, files[0])
    assert cache.counters.retries == 2
