"""The cache of a corpus from elsewhere, on full disks and between processes that are killed."""

from __future__ import annotations

import hashlib
import json
import signal
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from pathlib import Path

import numpy as np
import pytest
import xxhash

from llmtrain.corpus.cache import Cache, CacheConfig
from llmtrain.corpus.cache_folder import RemoteFile
from llmtrain.corpus.tar_files import TarFileError
from llmtrain.errors import DataError
from tests.support.remote_files import wait_until
from tests.support.remote_streams import loader_of, refusal, stream
from tests.support.servers import FileServer
from tests.support.training import REPOSITORY

pytestmark = pytest.mark.usefixtures("short_waits")


SIZE = 300_000

READER = """
import hashlib, json, sys
import numpy as np
from llmtrain.corpus import transport
from llmtrain.corpus.cache import Cache, CacheConfig
from pathlib import Path

transport.FIRST_WAIT = 0.01
job = json.loads(sys.argv[1])
cache = Cache(CacheConfig(dir=Path(job["dir"]), bytes=job["bytes"], timeout=5.0))
found = []
for number in np.random.default_rng(job["seed"]).permutation(job["order"]).tolist():
    with open(cache.open(*job["files"][number]), "rb") as file:
        found.append((number, hashlib.sha256(file.read()).hexdigest()))
print(json.dumps(found))
"""
"""Reads files of a cache in an order of its own and prints what they held."""


@pytest.fixture
def files(tmp_path: Path) -> Iterator[tuple[FileServer, list[RemoteFile]]]:
    """A server, and its five files of SIZE bytes."""
    folder = tmp_path / "served"
    folder.mkdir()
    rng = np.random.default_rng(0)
    found = []
    with FileServer(folder) as server:
        for number in range(5):
            content = rng.bytes(SIZE)
            (folder / f"{number}.tar").write_bytes(content)
            found.append(RemoteFile(f"{server.url}/{number}.tar", SIZE, xxhash.xxh3_128_hexdigest(content)))
        yield server, found


def start_reader(
    folder: Path, files: Sequence[RemoteFile], order: Sequence[int], *, bound: int = 1 << 30, seed: int = 0
) -> subprocess.Popen[str]:
    job = {
        "dir": str(folder),
        "bytes": bound,
        "files": [(file.url, file.size, file.xxh3_128) for file in files],
        "order": list(order),
        "seed": seed,
    }
    return subprocess.Popen(
        [sys.executable, "-c", READER, json.dumps(job)],
        cwd=REPOSITORY,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )


def finish_reader(process: subprocess.Popen[str]) -> list[tuple[int, str]]:
    output, error = process.communicate(timeout=120)
    assert process.returncode == 0, error
    return [(number, found) for number, found in json.loads(output)]


def expected(server: FileServer, number: int) -> str:
    return hashlib.sha256((server.folder / f"{number}.tar").read_bytes()).hexdigest()


def partial_size(folder: Path, file: RemoteFile) -> int:
    path = folder / f"{file.name}.partial"
    return path.stat().st_size if path.exists() else 0


@pytest.mark.slow
def test_many_processes_in_less_room_than_they_need(
    files: tuple[FileServer, list[RemoteFile]], tmp_path: Path
):
    server, remote = files
    server.faults.cut_every = 7
    order = [0, 1, 2, 3, 4] * 4
    readers = [
        start_reader(tmp_path / "cache", remote, order, bound=2 * SIZE, seed=seed) for seed in range(4)
    ]
    for reader in readers:
        found = finish_reader(reader)
        assert len(found) == len(order)
        assert all(digest == expected(server, number) for number, digest in found)
    sizes = [path.stat().st_size for path in (tmp_path / "cache").iterdir()]
    assert sum(sizes) <= 2 * SIZE


@pytest.mark.slow
def test_a_process_killed_while_it_downloads_is_gone_on_from(
    files: tuple[FileServer, list[RemoteFile]], tmp_path: Path
):
    server, remote = files
    server.faults.slow = 0.5
    killed = start_reader(tmp_path / "cache", remote, [0])
    wait_until(lambda: partial_size(tmp_path / "cache", remote[0]) > 0)
    killed.send_signal(signal.SIGKILL)
    killed.communicate()
    arrived = partial_size(tmp_path / "cache", remote[0])
    server.faults.slow = 0.0
    assert finish_reader(start_reader(tmp_path / "cache", remote, [0])) == [(0, expected(server, 0))]
    assert server.ranges("0.tar") == [None, f"bytes={arrived}-"]


@pytest.mark.slow
def test_a_process_that_waits_goes_on_from_where_a_killed_one_was(
    files: tuple[FileServer, list[RemoteFile]], tmp_path: Path
):
    server, remote = files
    server.faults.slow = 1.0
    killed = start_reader(tmp_path / "cache", remote, [0])
    wait_until(lambda: partial_size(tmp_path / "cache", remote[0]) > 0)
    waiting = start_reader(tmp_path / "cache", remote, [0])
    # It has come to the file's lock, or will soon; both end alike.
    time.sleep(0.5)
    killed.send_signal(signal.SIGKILL)
    server.faults.slow = 0.0
    killed.communicate()
    assert finish_reader(waiting) == [(0, expected(server, 0))]
    first, second = server.ranges("0.tar")
    assert (first, str(second)[:6]) == (None, "bytes=")


def read(cache: Cache, file: RemoteFile) -> str:
    with open(cache.open(file.url, file.size, file.xxh3_128), "rb") as opened:
        return hashlib.sha256(opened.read()).hexdigest()


def test_a_disk_smaller_than_the_bound(files: tuple[FileServer, list[RemoteFile]], small_disk: Path):
    server, remote = files
    cache = Cache(CacheConfig(dir=small_disk / "cache"))
    for number in (0, 1, 2, 3, 4, 0):
        assert read(cache, remote[number]) == expected(server, number)
    assert cache.counters.evictions == 3
    # What had arrived when the disk was full is gone on from.
    first, second = server.ranges("3.tar")
    assert (first, second) == (None, f"bytes={second[6:-1]}-")
    assert int(second[6:-1]) > 100_000
    cache.close()


def test_reading_ahead_on_a_full_disk_waits(files: tuple[FileServer, list[RemoteFile]], small_disk: Path):
    server, remote = files
    cache = Cache(CacheConfig(dir=small_disk / "cache", downloads=1))
    cache.want(remote)
    wait_until(lambda: cache.counters.files == 3)
    for number in range(5):
        assert read(cache, remote[number]) == expected(server, number)
    assert cache.counters.files == 5
    cache.close()


def test_a_disk_that_others_have_filled(files: tuple[FileServer, list[RemoteFile]], small_disk: Path):
    _, remote = files
    (small_disk / "other").write_bytes(bytes(900_000))
    cache = Cache(CacheConfig(dir=small_disk / "cache"))
    with pytest.raises(DataError) as caught:
        read(cache, remote[0])
    message = str(caught.value)
    assert f"data.cache.dir={small_disk}/cache: got a full disk" in message
    assert f"allowed: 300,000 bytes for {remote[0].url}" in message
    assert "another data.cache.dir or a smaller data.cache.bytes" in message
    assert not isinstance(caught.value, TarFileError)
    # It leaves nothing on a disk that others need.
    assert sum(path.stat().st_size for path in (small_disk / "cache").iterdir()) == 0
    cache.close()


def test_a_full_cache_disk(served: FileServer, small_disk: Path):
    (small_disk / "other").write_bytes(bytes(1_030_000))
    message = refusal(lambda: stream(loader_of(f"{served.url}/corpus", small_disk / "cache")))
    assert f"data.cache.dir={small_disk}/cache: got a full disk" in message
