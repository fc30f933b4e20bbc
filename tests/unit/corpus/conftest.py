"""Fixtures of several tests of corpora from elsewhere."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
import xxhash

from llmtrain.corpus.cache import Cache, CacheConfig
from llmtrain.corpus.cache_folder import RemoteFile
from tests.support.remote_files import FILE_SIZE, Make
from tests.support.servers import FileServer


@pytest.fixture
def partial(tmp_path: Path) -> Path:
    return tmp_path / "a.partial"


@pytest.fixture
def server(tmp_path: Path) -> Iterator[FileServer]:
    """Of six files of FILE_SIZE bytes."""
    folder = tmp_path / "served"
    folder.mkdir()
    rng = np.random.default_rng(0)
    for number in range(6):
        (folder / f"{number}.tar").write_bytes(rng.bytes(FILE_SIZE))
    with FileServer(folder) as server:
        yield server


@pytest.fixture
def files(server: FileServer) -> list[RemoteFile]:
    return [
        RemoteFile(f"{server.url}/{path.name}", FILE_SIZE, xxhash.xxh3_128_hexdigest(path.read_bytes()))
        for path in sorted(server.folder.iterdir())
    ]


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
