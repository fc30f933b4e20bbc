"""Jobs whose launchers restart them: a killed rank, a crash loop, mistakes, stop requests, and a host that is
gone for good."""

from __future__ import annotations

import os
import signal
import subprocess
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import psutil
import pytest

from llmtrain.track.events import read_events
from tests.faults.test_launch_torchrun import (
    TRAINING,
    finish,
    hosts,
    kill_rank,
    losses,
    start,
    start_on,
    unavailable,
    wait_for_first_step,
)
from tests.support.ranks import free_port
from tests.support.two_hosts import Hosts
from tests.support.warm import Popen

__all__ = ["hosts"]
pytestmark = pytest.mark.slow

LONG = (
    *TRAINING,
    "checkpoint.every=10",
    "evaluation.at_start=false",
    "evaluation.every=null",
    "engine=local",
)


def wait_until(is_true: Callable[[], object], seconds: float = 90) -> None:
    deadline = time.monotonic() + seconds
    while not is_true():
        assert time.monotonic() < deadline, "it does not happen"
        time.sleep(0.1)


def events(run: Path, kind: str) -> list[int]:
    """The steps of the events of a kind."""
    return [event.step or 0 for event in read_events(run / "events.jsonl") if event.kind == kind]


@contextmanager
def job(hosts: int, *overrides: str, **environment: str) -> Iterator[list[Popen]]:
    """A launcher with one rank on each host; the first serves. They have ended when the block has."""
    shared = {"RDZV_ENDPOINT": f"127.0.0.1:{free_port()}", "NPROC_PER_NODE": "1", **environment}
    shared.setdefault("NNODES", str(hosts))
    launchers = [start(*overrides, **shared)]
    try:
        if hosts > 1:
            where = ("127.0.0.1", int(shared["RDZV_ENDPOINT"].rpartition(":")[2]))
            wait_until(lambda: any(c.laddr[:2] == where for c in psutil.net_connections("tcp")))
        launchers += [start(*overrides, **shared) for _ in range(hosts - 1)]
        yield launchers
    finally:
        for launcher in launchers:
            if launcher.poll() is None:
                launcher.kill()


def kill_host(launcher: Popen) -> None:
    """As a machine that loses its power: launcher and ranks at once."""
    own = psutil.Process(launcher.pid)
    family = [*own.children(recursive=True), own]
    for process in family:
        process.send_signal(signal.SIGSTOP)
    for process in family:
        process.kill()


def test_a_killed_rank_is_restarted_and_the_curve_is_that_of_an_undisturbed_run(
    corpus: Path, tmp_path: Path
) -> None:
    run, undisturbed = tmp_path / "run", tmp_path / "undisturbed"
    training = [*LONG, f"data.path={corpus}", "train.steps=60"]
    with job(2, *training, f"run.dir={run}", MAX_RESTARTS="2") as launchers:
        wait_until(lambda: events(run, "save"))
        kill_rank(1, next(each for each in launchers if has_rank(1, each)))
        (code, output), (other_code, other) = finish(list(launchers))
    assert (code, other_code) == (0, 0), output + other
    said = output + other
    [restart] = [event for event in read_events(run / "events.jsonl") if event.kind == "restart"]
    assert f"killed by SIGKILL, as when memory runs out): restart 1 of 2, from step {restart.step}\n" in said
    assert events(run, "start") == [0, restart.step]
    assert (run / "logs/rank0.1.log").exists(), "the log of the first attempt is kept"
    with job(2, *training, f"run.dir={undisturbed}") as launchers:
        assert [code for code, _ in finish(list(launchers))] == [0, 0]
    assert losses(run) == losses(undisturbed), "bit for bit"


def has_rank(rank: int, launcher: Popen) -> bool:
    return any(
        child.name() == f"rank {rank}" for child in psutil.Process(launcher.pid).children(recursive=True)
    )


def test_one_of_three_hosts_is_gone_for_good(corpus: Path, tmp_path: Path) -> None:
    """The others go on with a layout of two; one that comes is taken at the next restart."""
    run, undisturbed = tmp_path / "run", tmp_path / "undisturbed"
    training = [*LONG, f"data.path={corpus}", "train.steps=120", "batch.global_size=12", "parallel.data=3"]
    with job(3, *training, f"run.dir={run}", NNODES="2:3") as launchers:
        wait_until(lambda: events(run, "save"))
        kill_host(next(each for each in launchers[1:]))
        codes = finish(list(launchers))
    output = "".join(said for _, said in codes)
    assert [code for code, _ in codes].count(0) == 2, output
    [restart] = events(run, "restart")
    assert f"gave no sign of life: restart 1 of 100, from step {restart}\n" in output
    assert "note: parallel.data was 3 and is 2" in output
    with job(1, *training, f"run.dir={undisturbed}", "parallel.data=1") as launchers:
        assert finish(list(launchers))[0][0] == 0
    np.testing.assert_allclose(losses(run), losses(undisturbed), rtol=1e-5)


def test_what_is_not_restarted(corpus: Path, tmp_path: Path) -> None:
    """A mistake, a stop request, and a failure that comes again and again without a new step."""
    training = [*LONG, f"data.path={corpus}", "train.steps=100000"]
    with job(1, *training, "model.num_leyers=2", f"run.dir={tmp_path}/wrong", MAX_RESTARTS="9") as launchers:
        [(code, output)] = finish(list(launchers))
    assert code == 2, output
    assert "restart" not in output
    run = tmp_path / "asked"
    with job(1, *training, f"run.dir={run}", MAX_RESTARTS="9") as launchers:
        wait_for_first_step(run)
        launchers[0].terminate()
        [(code, output)] = finish(list(launchers))
    assert (code, events(run, "restart")) == (75, []), output
    run = tmp_path / "loop"
    with job(1, *training, f"run.dir={run}", "checkpoint.every=null", MAX_RESTARTS="9") as launchers:
        for number in range(3):
            wait_until(lambda number=number: len(events(run, "start")) == number + 1)
            kill_rank(0, launchers[0])
        [(code, output)] = finish(list(launchers))
    assert code == 137, output
    assert events(run, "restart") == [0, 0]
    assert "no restart: rank 0 exited with 137 (killed by SIGKILL, as when memory runs out); " in output
    assert output.rstrip().endswith("3 failures without a new step")


def test_bounds_without_a_layout_and_folders_that_are_not_shared(corpus: Path, tmp_path: Path) -> None:
    training = [*LONG, f"data.path={corpus}", "train.steps=4", "parallel.tensor=2", f"run.dir={tmp_path}/run"]
    with job(1, *training, NNODES="1:2", LOG_DIR=str(tmp_path / "logs")) as launchers:
        [(code, output)] = finish(list(launchers))
    assert code == 2, output
    told = "NNODES: got 1:2, but no layout fits 1 process; allowed: MIN among 2; name the axes that may"
    assert [line[: len(told)] for line in output.splitlines()] == [told], output


def test_a_stop_request_ends_a_host_that_waits(tmp_path: Path) -> None:
    environment = {"NNODES": "2:3", "RDZV_ENDPOINT": f"127.0.0.1:{free_port()}", "LOG_DIR": str(tmp_path)}
    waiting = start("model=gpt_tiny", "data.path=none", **environment)
    time.sleep(2)
    os.kill(waiting.pid, signal.SIGTERM)
    [(code, output)] = finish([waiting])
    assert code == 75, output


@pytest.mark.long("a host without a network notices after half a minute")
def test_a_host_whose_network_is_cut_is_left_behind(hosts: Hosts, corpus: Path, tmp_path: Path) -> None:
    """No connection breaks: the signs of life tell. It ends its own ranks; the other goes on without it."""
    if not hosts.prefixes[1]:
        unavailable("it needs hosts with addresses of their own")
    run = tmp_path / "run"
    training = [*LONG, f"data.path={corpus}", f"run.dir={run}", "train.steps=80"]
    ip, _, _, name = hosts.prefixes[1]
    cable = [ip, "-n", name, "link", "set", f"lt{os.getpid()}b"]
    meeting = {"RDZV_ENDPOINT": f"{hosts.address}:29621", "NNODES": "1:2", "NPROC_PER_NODE": "1"}
    launchers = start_on(hosts, *training, **meeting)
    try:
        wait_until(lambda: events(run, "save"))
        subprocess.run([*cable, "down"], check=True)
        (code, output), (cut_code, cut) = finish(launchers)
    finally:
        subprocess.run([*cable, "up"], check=True)
    assert code == 0, output
    assert "llmtrain: host 1 gave no sign of life: restart 1 of 100, from step " in output
    assert len(losses(run)) == 80
    assert cut_code == 1, cut
    assert "host 0 gave no answer for 30 s: this host ends its ranks" in cut
