"""Files from elsewhere, and what a cache holds of them."""

from __future__ import annotations

import time
from collections.abc import Callable
from pathlib import Path

import numpy as np

from llmtrain.corpus.cache import Cache
from llmtrain.corpus.cache_folder import RemoteFile
from tests.support.servers import FileServer

CONTENT = np.random.default_rng(0).bytes(300_000)
SIZE = len(CONTENT)
FILE_SIZE = 200_000
"""Of each file that the fixture `files` lists."""
Make = Callable[..., Cache]
"""Takes keys of CacheConfig; `make`, a fixture, closes what it made."""


def get(cache: Cache, file: RemoteFile) -> bytes:
    with open(cache.open(file.url, file.size, file.xxh3_128), "rb") as opened:
        return opened.read()


def content(server: FileServer, number: int) -> bytes:
    return (server.folder / f"{number}.tar").read_bytes()


def held(folder: Path) -> int:
    """Bytes of the files in a cache."""
    return sum(path.stat().st_size for path in folder.iterdir())


def wait_until(condition: Callable[[], bool]) -> None:
    for _ in range(6000):
        if condition():
            return
        time.sleep(0.01)
    raise AssertionError("it does not come true")
