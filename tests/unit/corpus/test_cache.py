"""What the cache gives is what the manifest says; it keeps to its room, and says why it can't."""

from __future__ import annotations

import errno
import os
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

import numpy as np
import pytest
import xxhash

from llmtrain.config import decode
from llmtrain.corpus import transport
from llmtrain.corpus.cache import Cache, CacheConfig
from llmtrain.corpus.cache_folder import RemoteFile
from llmtrain.corpus.tar_files import TarFileError
from llmtrain.errors import ConfigError, DataError
from tests.support.servers import Faults, FileServer

SIZE = 200_000


@pytest.fixture(autouse=True)
def short_waits(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(transport, "FIRST_WAIT", 0.001)


@pytest.fixture
def server(tmp_path: Path) -> Iterator[FileServer]:
    """Of six files of SIZE bytes."""
    folder = tmp_path / "served"
    folder.mkdir()
    rng = np.random.default_rng(0)
    for number in range(6):
        (folder / f"{number}.tar").write_bytes(rng.bytes(SIZE))
    with FileServer(folder) as server:
        yield server


@pytest.fixture
def files(server: FileServer) -> list[RemoteFile]:
    return [
        RemoteFile(f"{server.url}/{path.name}", SIZE, xxhash.xxh3_128_hexdigest(path.read_bytes()))
        for path in sorted(server.folder.iterdir())
    ]


Make = Callable[..., Cache]


@pytest.fixture
def make(tmp_path: Path) -> Iterator[Make]:
    caches = []

    def make(**options: object) -> Cache:
        config = {"dir": tmp_path / "cache", "retries": 2, "timeout": 2.0, "downloads": 2, **options}
        caches.append(Cache(CacheConfig(**config)))  # type: ignore[arg-type]
        return caches[-1]

    yield make
    for cache in caches:
        cache.close()


def get(cache: Cache, file: RemoteFile) -> bytes:
    with open(cache.open(file.url, file.size, file.xxh3_128), "rb") as opened:
        return opened.read()


def content(server: FileServer, number: int) -> bytes:
    return (server.folder / f"{number}.tar").read_bytes()


def held(folder: Path) -> int:
    """Bytes of the files in a cache."""
    return sum(path.stat().st_size for path in folder.iterdir())


def wait_until(condition: Callable[[], bool]) -> None:
    for _ in range(1000):
        if condition():
            return
        time.sleep(0.01)
    raise AssertionError("it does not come true")


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
    assert (cache.counters.files, cache.counters.bytes) == (1, SIZE)


def test_the_same_content_elsewhere_is_the_same_file(
    server: FileServer, files: Sequence[RemoteFile], make: Make
):
    cache = make()
    get(cache, files[0])
    other = RemoteFile(f"{server.url}/nowhere", SIZE, files[0].xxh3_128)
    assert get(cache, other) == content(server, 0)


def test_an_opened_file_outlives_its_eviction(server: FileServer, files: Sequence[RemoteFile], make: Make):
    cache = make(bytes=SIZE)
    descriptor = cache.open(files[0].url, SIZE, files[0].xxh3_128)
    get(cache, files[1])
    with open(descriptor, "rb") as file:
        assert file.read() == content(server, 0)
    assert cache.counters.evictions == 1


def test_what_was_not_used_for_the_longest_time_goes(
    server: FileServer, files: Sequence[RemoteFile], make: Make, tmp_path: Path
):
    cache = make(bytes=3 * SIZE)
    for number in (0, 1, 2, 0, 3):
        assert get(cache, files[number]) == content(server, number)
    names = {path.name for path in (tmp_path / "cache").iterdir()} - {".lock"}
    kept = {files[number].name for number in (0, 2, 3)}
    assert names == kept | {f"{name}.used" for name in kept}
    assert cache.counters.evictions == 1


def test_a_smaller_bound_than_before(files: Sequence[RemoteFile], make: Make, tmp_path: Path):
    for file in files[:4]:
        get(make(), file)
    get(make(bytes=2 * SIZE + 1), files[4])
    assert held(tmp_path / "cache") == 2 * SIZE


def test_other_files_in_its_folder_stay(files: Sequence[RemoteFile], make: Make, tmp_path: Path):
    other = tmp_path / "cache" / "thesis.txt"
    other.parent.mkdir()
    other.write_bytes(bytes(2 * SIZE))
    cache = make(bytes=SIZE)
    get(cache, files[0])
    get(cache, files[1])
    assert other.exists()


def test_a_file_larger_than_the_bound(files: Sequence[RemoteFile], make: Make, server: FileServer):
    with pytest.raises(DataError, match=r"0.tar: got a file of 200,000 bytes; .*data.cache.bytes=199,999"):
        get(make(bytes=SIZE - 1), files[0])
    assert server.log == []


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
    assert (cache.counters.files, cache.counters.bytes) == (1, 2 * SIZE)


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
        get(make(), RemoteFile(f"{server.url}/0.tar", SIZE, checksum))
    assert server.log == []


def test_small_files(server: FileServer, files: Sequence[RemoteFile], make: Make):
    cache = make()
    assert cache.read_small(files[0].url, 1 << 20) == content(server, 0)
    assert cache.read_small(files[0].url, 1 << 20, files[0].xxh3_128) == content(server, 0)
    with pytest.raises(DataError, match=r"0.tar: got an altered file") as caught:
        cache.read_small(files[0].url, 1 << 20, files[1].xxh3_128)
    assert not isinstance(caught.value, TarFileError)


def test_kept_content_has_a_path(make: Make, tmp_path: Path, files: Sequence[RemoteFile]):
    cache = make(bytes=SIZE)
    path = cache.keep(b"a model", ".model")
    assert path.suffix == ".model"
    path.write_bytes(b"altered")
    assert cache.keep(b"a model", ".model") == path
    for file in files:
        get(cache, file)
    assert path.read_bytes() == b"a model"


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


def test_threads_in_less_room_than_they_need(
    server: FileServer, files: Sequence[RemoteFile], make: Make, tmp_path: Path
):
    """Each opens its files before they go, and never do they take more than the bound."""
    cache = make(bytes=2 * SIZE)
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
    assert held(tmp_path / "cache") <= 2 * SIZE
    assert most <= 3 * SIZE  # files that come and go between two looks are counted twice


def test_reading_ahead_in_order(server: FileServer, files: Sequence[RemoteFile], make: Make):
    cache = make(downloads=1)
    cache.want(files[:4])
    wait_until(lambda: cache.counters.files == 4)
    assert [request.path for request in server.log] == ["0.tar", "1.tar", "2.tar", "3.tar"]
    assert get(cache, files[2]) == content(server, 2)
    assert len(server.log) == 4


def test_a_new_list_replaces_what_is_still_queued(
    server: FileServer, files: Sequence[RemoteFile], make: Make
):
    server.faults.slow = 0.1
    cache = make(downloads=1)
    cache.want(files[:4])
    wait_until(lambda: len(server.log) == 1)
    cache.want([files[5]])
    wait_until(lambda: cache.counters.files == 2)
    assert [request.path for request in server.log] == ["0.tar", "5.tar"]
    # A thread that had nothing left to do has ended; another begins.
    wait_until(lambda: not cache._threads)
    cache.want([files[2]])
    wait_until(lambda: cache.counters.files == 3)


def test_reading_ahead_waits_for_room_instead_of_evicting_what_is_wanted(
    server: FileServer, files: Sequence[RemoteFile], make: Make
):
    cache = make(bytes=2 * SIZE, downloads=2)
    cache.want(files)
    wait_until(lambda: cache.counters.files == 2)
    for number in range(6):
        assert get(cache, files[number]) == content(server, number)
        wait_until(lambda: cache.counters.files >= min(number + 2, 6))  # noqa: B023
    assert len(server.log) == 6


def test_reading_ahead_makes_room_of_what_is_not_wanted(files: Sequence[RemoteFile], make: Make):
    for file in files[:2]:
        get(make(), file)
    cache = make(bytes=2 * SIZE)
    cache.want(files[2:4])
    wait_until(lambda: cache.counters.files == 2)
    assert cache.counters.evictions == 2


def test_errors_ahead_stay_quiet_until_the_file_is_asked_for(
    server: FileServer, files: Sequence[RemoteFile], make: Make
):
    server.faults.missing.add("0.tar")
    cache = make(downloads=1)
    cache.want([files[0], RemoteFile("nowhere://a", 1, "?"), files[1]])
    wait_until(lambda: cache.counters.files == 1)
    assert get(cache, files[1]) == content(server, 1)
    with pytest.raises(TarFileError, match=r"0.tar: got no such file"):
        get(cache, files[0])


def test_a_file_that_is_being_read_ahead_is_waited_for(
    server: FileServer, files: Sequence[RemoteFile], make: Make
):
    server.faults.slow = 0.1
    cache = make()
    cache.want(files[:1])
    wait_until(lambda: len(server.log) == 1)
    assert get(cache, files[0]) == content(server, 0)
    assert len(server.log) == 1


def test_closing_ends_what_runs(server: FileServer, files: Sequence[RemoteFile], make: Make, tmp_path: Path):
    server.faults.slow = 0.1
    cache = make(downloads=1)
    cache.want(files)
    wait_until(lambda: cache.counters.bytes > 0)
    cache.close()
    assert not [thread for thread in threading.enumerate() if thread.name == "shard download"]
    server.faults.slow = 0.0
    assert get(make(), files[0]) == content(server, 0)
    assert server.log[-1].range is not None


def test_counters_of_what_went_wrong(server: FileServer, files: Sequence[RemoteFile], make: Make):
    server.faults = Faults(cuts=[1000], unavailable=1)
    cache = make()
    get(cache, files[0])
    assert cache.counters.retries == 2


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
