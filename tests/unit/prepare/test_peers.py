"""Processes of one job meet, wait for each other, and end with the name of the one that does not come."""

import json
import multiprocessing
import socket
import threading
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest

from llmtrain.errors import DataError, Problem
from llmtrain.prepare import peers as module
from llmtrain.prepare.peers import LostPeerError, Peers


@pytest.fixture(autouse=True)
def _fast(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(module, "HEARTBEAT_SECONDS", 0.05)


def together(size: int, function: Callable[[int], Any]) -> list[Any]:
    """What function(rank) gives in each of `size` threads, or the error it raises."""

    def caught(rank: int) -> Any:
        try:
            return function(rank)
        except DataError as error:
            return error

    with ThreadPoolExecutor(size) as pool:
        return [*pool.map(caught, range(size))]


def test_one_process_alone_waits_for_nobody_and_writes_nothing(tmp_path: Path):
    peers = Peers(tmp_path / "work")
    peers.meet()
    assert peers.barrier("word") == "word"
    assert [n for n in range(4) if peers.is_mine(n)] == [0, 1, 2, 3]
    peers.leave()
    peers.await_end()
    assert not (tmp_path / "work").exists()


def test_the_word_of_rank_0_reaches_all_and_each_piece_is_one_process_own(tmp_path: Path):
    def run(rank: int) -> tuple[str, list[int]]:
        peers = Peers(tmp_path, rank, 3, "job", seconds=30)
        peers.meet()
        for number in range(5):
            word = peers.barrier(f"word {number}" if rank == 0 else "")
        peers.leave()
        peers.await_end()
        return word, [n for n in range(7) if peers.is_mine(n)]

    assert together(3, run) == [("word 4", [0, 3, 6]), ("word 4", [1, 4]), ("word 4", [2, 5])]


def test_a_word_that_is_read_late_is_the_word_of_its_stage(tmp_path: Path):
    """Rank 0 may be one stage ahead when another, slow, looks for what it said."""

    def run(rank: int) -> list[str]:
        peers = Peers(tmp_path, rank, 2, "job", seconds=30)
        peers.meet()
        if rank == 1:
            real = peers._read

            def late(other: int) -> Any:
                while (state := real(other)) is None or state.barrier <= peers._state.barrier < 3:
                    time.sleep(0.01)
                return state

            peers._read = late  # type: ignore[method-assign]
        words = [peers.barrier(word if rank == 0 else "") for word in ("first", "", "third", "")]
        peers.leave()
        peers.await_end()
        return words

    assert together(2, run) == [["first", "", "third", ""]] * 2


def test_one_that_leaves_too_early_is_named(tmp_path: Path):
    def run(rank: int) -> None:
        peers = Peers(tmp_path, rank, 2, "job", seconds=30)
        peers.meet()
        peers.barrier()
        if rank == 0:
            peers.barrier()
        peers.leave()

    assert "a process that left before its work was done" in str(together(2, run)[0])


def test_what_a_killed_job_left_is_not_taken_for_this_one(tmp_path: Path):
    """The same launcher names both jobs alike, and the old one's members look complete."""
    folder = tmp_path / "peers"
    folder.mkdir()
    call = {"job": "job", "id": "old", "size": 2, "members": ["x", "y"]}
    (folder / "job.json").write_text(json.dumps(call))
    state = {"nonce": "y", "host": "h", "pid": 1, "pid_namespace": "", "beat": 9, "barrier": 99}
    (folder / "old-00001.json").write_text(json.dumps(state))
    started = threading.Event()

    def run(rank: int) -> str:
        peers = Peers(tmp_path, rank, 2, "job", seconds=30)
        if rank == 1:
            started.set()
        else:
            started.wait()
        peers.meet()
        word = peers.barrier("new" if rank == 0 else "")
        peers.leave()
        return word

    assert together(2, run) == ["new", "new"]
    assert not (folder / "old-00001.json").exists()


@pytest.mark.parametrize("stranger", [("another job", 2), ("job", 3)])
def test_processes_of_another_job_or_size_do_not_meet(tmp_path: Path, stranger: tuple[str, int]):
    def run(rank: int) -> None:
        job, size = ("job", 2) if rank == 0 else stranger
        Peers(tmp_path, rank, size, job, seconds=0.3).meet()

    first, second = together(2, run)
    assert str(first) == (
        f"{tmp_path.parent}: got no answer from rank 1 of 2 within 0.3 s; "
        "start all processes with one output folder that all hosts see"
    )
    assert "no answer from rank 0 within 0.3 s" in str(second)


def test_a_failure_is_everybody_s_and_told_by_rank_0(tmp_path: Path):
    def run(rank: int) -> None:
        peers = Peers(tmp_path, rank, 3, "job", seconds=30)
        peers.meet()
        if rank == 1:
            error = DataError(Problem("a.txt", "a mistake", "none", "mend it"))
            peers.leave(error)
            raise error
        peers.barrier()

    errors = together(3, run)
    assert [str(error) for error in errors] == ["a.txt: got a mistake; allowed: none; mend it"] * 3
    assert all(error.everywhere for error in errors)


def test_one_that_stands_still_is_named(tmp_path: Path):
    def run(rank: int) -> None:
        peers = Peers(tmp_path, rank, 2, "job", seconds=1.5)
        peers.meet()
        if rank == 1:
            peers._ended.set()  # as a host that hangs: the process is there, its heart stands still
            return
        peers.barrier()

    lost, _ = together(2, run)
    assert isinstance(lost, LostPeerError)
    assert str(lost) == (
        f"rank 1 on {socket.gethostname()}: got no heartbeat for 1.5 s before its work was done; "
        "see its messages, then run the same command again: finished work is kept"
    )


def meet_and_die(work: Path) -> None:
    Peers(work, 1, 2, "job", seconds=30).meet()


def test_one_that_died_on_this_host_is_noticed_at_once(tmp_path: Path):
    process = multiprocessing.get_context("spawn").Process(target=meet_and_die, args=(tmp_path,))
    process.start()
    peers = Peers(tmp_path, 0, 2, "job", seconds=600)
    peers.meet()
    process.join()
    with pytest.raises(LostPeerError, match=r"rank 1 on .*: got a process that ended before"):
        peers.barrier()


def test_a_long_stage_is_cut_short_when_another_failed(tmp_path: Path):
    def run(rank: int) -> str:
        peers = Peers(tmp_path, rank, 2, "job", seconds=30)
        peers.meet()
        if rank == 1:
            error = DataError(Problem("a.txt", "a mistake"))
            peers.leave(error)
            raise error
        while True:
            peers.check()

    assert [str(error) for error in together(2, run)] == ["a.txt: got a mistake"] * 2


def test_work_that_another_host_does_not_see_is_named(tmp_path: Path):
    def run(rank: int) -> list[int]:
        peers = Peers(tmp_path, rank, 2, "job", seconds=1.5)
        peers.meet()
        peers.barrier()
        return [*peers.await_visible(lambda number: None if number == 3 and rank == 0 else number, range(4))]

    lost, seen = together(2, run)
    assert seen == [0, 1, 2, 3]
    host = socket.gethostname()
    assert f"got finished work of rank 1 on {host} that {host} does not see" in str(lost)


def test_others_wait_until_rank_0_has_ended_its_work(tmp_path: Path):
    told: list[str] = []

    def run(rank: int) -> None:
        peers = Peers(tmp_path, rank, 3, "job", seconds=30)
        peers.meet()
        if rank == 0:
            peers.await_end()
            told.append("work")
            peers.leave()
        else:
            peers.leave()
            peers.await_end()
            told.append("end")

    together(3, run)
    assert told == ["work", "end", "end"]
