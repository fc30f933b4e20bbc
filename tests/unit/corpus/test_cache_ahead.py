"""Threads of the cache read ahead in order, and as far as there is room."""

from __future__ import annotations

import threading
from collections.abc import Sequence
from pathlib import Path

import pytest

from llmtrain.corpus.cache_folder import RemoteFile
from llmtrain.corpus.tar_files import TarFileError
from tests.support.remote_files import FILE_SIZE, Make, content, get, wait_until
from tests.support.servers import FileServer

pytestmark = pytest.mark.usefixtures("short_waits")


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
    cache = make(bytes=2 * FILE_SIZE, downloads=2)
    cache.want(files)
    wait_until(lambda: cache.counters.files == 2)
    for number in range(6):
        assert get(cache, files[number]) == content(server, number)
        wait_until(lambda: cache.counters.files >= min(number + 2, 6))  # noqa: B023
    assert len(server.log) == 6


def test_reading_ahead_makes_room_of_what_is_not_wanted(files: Sequence[RemoteFile], make: Make):
    for file in files[:2]:
        get(make(), file)
    cache = make(bytes=2 * FILE_SIZE)
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
