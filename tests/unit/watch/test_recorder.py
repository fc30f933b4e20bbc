"""What a rank notes, and what its neighbours read of it."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
import torch.distributed as dist

from llmtrain.watch import calls, kernel, layout, phases, recorder
from llmtrain.watch.checker import Calls, first_divergence
from llmtrain.watch.neighbours import Folder
from llmtrain.watch.recorder import Recorder
from tests.support import ranks


@pytest.fixture
def noting(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Recorder]:
    made = Recorder(tmp_path / "rank0", 0)
    monkeypatch.setattr(recorder, "current", made)
    yield made
    made.close()


def test_neighbours_read_step_phase_and_stack(noting: Recorder):
    phases.begin_step(7)
    phases.begin_micro_batch(2)
    with phases.BACKWARD:
        noting.write_text(time.monotonic())
        state = layout.read_state(noting.path, "here", time.monotonic())
    assert state is not None
    assert (state.pid, state.step, state.micro, state.phase) == (os.getpid(), 7, 2, "backward")
    assert state.stack[-1][2] == "stack"
    assert any(function == "test_neighbours_read_step_phase_and_stack" for _, _, function in state.stack)
    assert layout.RankState.decode(state.encode()) == state
    after = layout.read_state(noting.path, "here", time.monotonic())
    assert after is not None
    assert (after.phase, after.is_warm, after.ticks > state.ticks) == ("step", False, True)
    phases.begin_step(8)
    assert noting.is_warm
    phases.end_steps()
    assert noting.phase == "end"


def test_without_a_watch_phases_do_nothing():
    assert recorder.current is None
    with phases.FORWARD:
        phases.begin_micro_batch(1)


def test_a_stopped_process_is_told_from_one_that_ended():
    process = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(60)"])
    started = kernel.start_of(process.pid)
    assert kernel.state_of(process.pid, started) in ("running", "sleeping")
    process.send_signal(signal.SIGSTOP)
    os.waitid(os.P_PID, process.pid, os.WSTOPPED)
    assert kernel.state_of(process.pid, started) == kernel.STOPPED
    assert kernel.state_of(process.pid, started + 1) == kernel.ENDED
    process.kill()
    process.wait()
    assert kernel.state_of(process.pid, started) == kernel.ENDED


HOLDS_THE_LOCK = """
import sys, time
from llmtrain.watch.neighbours import Folder
from llmtrain.watch.recorder import Recorder

folder = Folder(sys.argv[1], "here", 0, [0])
recorder = Recorder(folder.file_of(0), 0)
folder.open_traces()
print("ready", flush=True)

def holds_the_lock():
    "a" * 10 in "a" * 9 + "b"
    sum(range(10**11))

holds_the_lock()
"""


def test_a_call_that_holds_the_lock_is_seen_by_a_neighbour():
    token = f"test-{os.getpid()}"
    process = subprocess.Popen([sys.executable, "-c", HOLDS_THE_LOCK, token], stdout=subprocess.PIPE)
    try:
        assert process.stdout is not None
        process.stdout.readline()
        time.sleep(2.5)  # no sign of life
        folder = Folder(token, "here", 1, [0])
        [state] = folder.examined()
    finally:
        process.kill()
        process.communicate()
        for file in folder.path.iterdir():
            file.unlink()
        folder.close()
    assert [function for _, _, function in state.stack] == ["<module>", "holds_the_lock"]
    assert state.silence > 2


def _noted_calls(folder: str, differs: int) -> tuple[layout.RankState, float]:
    """In a rank: note collectives, in one of which the rank `differs` has another type; → its state, and what
    a note costs."""
    rank = dist.get_rank()
    calls.install()
    path = Path(folder, f"rank{rank}")
    recorder.current = made = Recorder(path, rank, with_ring=True)
    try:
        phases.begin_step(1)
        values = torch.ones(3, 5)
        dist.all_reduce(values)
        phases.begin_step(2)
        dist.all_reduce(torch.ones(2, dtype=torch.int64 if rank == differs else torch.float64))
        work = dist.all_reduce(values, async_op=True)
        work.wait()
        if rank == 0:
            dist.send(values, 1)
        elif rank == 1:
            dist.recv(values, 0)
        made.write_text(time.monotonic())
        state = layout.read_state(path, "here", time.monotonic())
        assert state is not None
        began = time.perf_counter()
        for _ in range(1000):
            made.begin_call(dist.group.WORLD, "allreduce", ([values], None))
            made.end_call(None)
        return state, (time.perf_counter() - began) / 1000
    finally:
        recorder.current = None


@pytest.mark.slow
def test_collectives_are_noted_and_compared(tmp_path: Path):
    # gloo does not notice: both types have eight bytes.
    (first, cost), (second, _) = ranks.run(2, _noted_calls, str(tmp_path), 1)
    assert cost < 0.001
    assert first.call is not None
    assert (first.call.kind, first.call.ranks, first.call.number, first.call.size) == ("send", (0, 1), 1, 60)
    assert second.call is not None
    assert first.call.key == second.call.key
    assert 3 in first.counts.values()
    of_ranks = []
    for rank in range(2):
        records, places = layout.read_ring(tmp_path / f"rank{rank}")
        of_ranks.append(Calls(rank, f"node{rank}", records[:4], places))
    problem = first_divergence(of_ranks)
    assert problem is not None
    said = str(problem)
    for dtype in ("int64", "float64"):
        assert f"all_reduce of {dtype} (2,) at tests/unit/watch/test_recorder.py:" in said
    assert "in step 2" in said
    assert "as number 2 among its ranks" in said
    assert first_divergence([of_ranks[0], Calls(1, "node1", of_ranks[0].records, of_ranks[0].places)]) is None


def test_folders_of_ended_processes_are_removed_and_no_others():
    ended = subprocess.Popen([sys.executable, "-c", ""])
    ended.wait()
    folders = {name: Folder(f"test-{os.getpid()}-{name}", "here", 0, [0]) for name in ("ended", "new", "own")}
    left = Recorder(folders["ended"].file_of(0), 0)
    layout.HEAD.pack_into(left.buffer, layout.HEAD_AT, layout.MAGIC, ended.pid, 0, 1)
    folders["new"].file_of(0).touch()  # as between its making and its first byte
    own = Recorder(folders["own"].file_of(0), 0)
    last = Folder(f"test-{os.getpid()}-last", "here", 0, [0])
    try:
        assert {name: folder.path.exists() for name, folder in folders.items()} == {
            "ended": False,
            "new": True,
            "own": True,
        }
    finally:
        own.close()
        for folder in (*folders.values(), last):
            folder.close()
    assert not last.path.exists()
