"""Jobs whose launchers restart them: a killed rank, a crash loop, mistakes, stop requests, and a host that is
gone for good."""

from __future__ import annotations

import os
import signal
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import psutil
import pytest

from llmtrain.track.events import read_events
from tests.faults.test_launch_torchrun import (
    OPTIONS,
    TRAINING,
    clean,
    finish,
    hosts,
    kill_rank,
    losses,
    start,
    start_on,
    unavailable,
    wait_for_first_step,
)
from tests.support.ports import free_port
from tests.support.two_hosts import Hosts
from tests.support.warm import TORCHRUN, Popen, on_ranks

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


class Job:
    """Launchers with one rank on each host."""

    def __init__(self, overrides: Sequence[str], environment: Mapping[str, str]) -> None:
        self._overrides, self._environment = overrides, environment
        self.launchers: list[Popen] = []

    def add_host(self) -> Popen:
        self.launchers.append(start(*self._overrides, **self._environment))
        return self.launchers[-1]

    def host_of(self, rank: int) -> Popen:
        """The launcher of a rank."""

        def has_it(launcher: Popen) -> bool:
            children = psutil.Process(launcher.pid).children(recursive=True)
            return any(child.name() == f"rank {rank}" for child in children)

        return next(each for each in self.launchers if each.poll() is None and has_it(each))

    def finish(self) -> list[tuple[int, str]]:
        """Each launcher's exit code and output."""
        return finish(list(self.launchers))


@contextmanager
def job(num_hosts: int, *overrides: str, **environment: str) -> Iterator[Job]:
    """A launcher on each host; the first serves. They have ended when the block has."""
    shared = {"RDZV_ENDPOINT": f"127.0.0.1:{free_port()}", "NPROC_PER_NODE": "1", **environment}
    shared.setdefault("NNODES", str(num_hosts))
    started = Job(overrides, shared)
    try:
        started.add_host()
        if num_hosts > 1:
            where = ("127.0.0.1", int(shared["RDZV_ENDPOINT"].rpartition(":")[2]))
            wait_until(lambda: any(c.laddr[:2] == where for c in psutil.net_connections("tcp")))
        for _ in range(num_hosts - 1):
            started.add_host()
        yield started
    finally:
        for launcher in started.launchers:
            if launcher.poll() is None:
                launcher.kill()


def stop_in_start(number: int, job: Job, run: Path, count: int = 0) -> None:
    """Ask all hosts to stop once the job has taken a few steps in its start `number`, and `count` in all."""
    wait_until(lambda: len(events(run, "start")) == number)
    count = max(count, events(run, "start")[-1] + 3)
    wait_until(lambda: len(losses(run)) >= count)
    for launcher in job.launchers:
        if launcher.poll() is None:
            launcher.terminate()


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
    training = [*LONG, f"data.path={corpus}", "train.steps=100000"]
    with job(2, *training, f"run.dir={run}", MAX_RESTARTS="2") as disturbed:
        wait_until(lambda: events(run, "save"))
        kill_rank(1, disturbed.host_of(1))
        stop_in_start(2, disturbed, run)
        (code, output), (other_code, other) = disturbed.finish()
    assert (code, other_code) == (75, 75), output + other
    said = output + other
    [restart] = [event for event in read_events(run / "events.jsonl") if event.kind == "restart"]
    assert f"killed by SIGKILL, maybe out of memory): restart 1 of 2, from step {restart.step}\n" in said
    assert events(run, "start") == [0, restart.step]
    assert (run / "logs/rank0.1.log").exists(), "the log of the first attempt is kept"
    with job(2, *training, f"run.dir={undisturbed}") as whole:
        stop_in_start(1, whole, undisturbed, len(losses(run)))
        whole.finish()
    assert losses(run) == losses(undisturbed)[: len(losses(run))], "bit for bit"


@pytest.mark.long("a host counts as gone after ten seconds, and ranks on three hosts start three times")
def test_one_of_three_hosts_is_gone_for_good(corpus: Path, tmp_path: Path) -> None:
    """The others go on with a layout of two; one that comes meanwhile is taken at the next restart."""
    run, undisturbed = tmp_path / "run", tmp_path / "undisturbed"
    training = [*LONG, f"data.path={corpus}", "train.steps=100000", "batch.global_size=12", "parallel.data=3"]
    with job(3, *training, f"run.dir={run}", NNODES="2:3") as disturbed:
        wait_until(lambda: events(run, "save"))
        kill_host(disturbed.launchers[1])
        wait_until(lambda: len(events(run, "start")) == 2)
        spare = disturbed.add_host()
        assert spare.stdout is not None
        while "the job runs without this host, which waits" not in spare.stdout.readline():
            assert spare.poll() is None
        wait_until(lambda: events(run, "save")[-1] > events(run, "start")[-1])
        kill_rank(1, disturbed.host_of(1))
        stop_in_start(3, disturbed, run)
        ended = disturbed.finish()
    output = "".join(said for _, said in ended)
    assert [code for code, _ in ended] == [75, -signal.SIGKILL, 75, 75], output
    first, second = events(run, "restart")
    assert f"gave no sign of life: restart 1 of 100, from step {first}\n" in output
    assert f"restart 2 of 100, from step {second}\n" in output
    assert "note: parallel.data was 3 and is 2" in output
    assert "note: parallel.data was 2 and is 3" in output
    count = len(losses(run))
    with job(1, *training, f"run.dir={undisturbed}", "parallel.data=1") as whole:
        stop_in_start(1, whole, undisturbed, count)
        whole.finish()
    np.testing.assert_allclose(losses(run), losses(undisturbed)[:count], rtol=1e-5)


def test_what_is_not_restarted(corpus: Path, tmp_path: Path) -> None:
    """A mistake, a stop request, and a failure that comes again and again without a new step."""
    training = [*LONG, f"data.path={corpus}", "train.steps=100000"]
    with job(1, *training, "model.num_leyers=2", f"run.dir={tmp_path}/wrong", MAX_RESTARTS="9") as failing:
        [(code, output)] = failing.finish()
    assert code == 2, output
    assert "restart" not in output
    run = tmp_path / "asked"
    with job(1, *training, f"run.dir={run}", MAX_RESTARTS="9") as asked:
        wait_for_first_step(run)
        asked.launchers[0].terminate()
        [(code, output)] = asked.finish()
    assert (code, events(run, "restart")) == (75, []), output
    run = tmp_path / "loop"
    with job(1, *training, f"run.dir={run}", "checkpoint.every=null", MAX_RESTARTS="9") as looping:
        for number in range(3):
            wait_until(lambda number=number: len(events(run, "start")) == number + 1)
            kill_rank(0, looping.launchers[0])
        [(code, output)] = looping.finish()
    assert code == 137, output
    assert events(run, "restart") == [0, 0]
    assert "no restart: rank 0 exited with 137 (killed by SIGKILL, maybe out of memory); " in output
    assert output.rstrip().endswith("3 failures without a new step")


def test_hosts_without_a_shared_run_folder_are_refused(tmp_path: Path) -> None:
    """As after a requeue the run would begin anew on other nodes."""
    shared = {
        "RDZV_ENDPOINT": f"127.0.0.1:{free_port()}",
        "NPROC_PER_NODE": "1",
        "NNODES": "2",
        "REQUEUE": "1",
    }
    folders = [tmp_path / name for name in ("one", "other")]
    launchers = []
    for folder in folders:
        folder.mkdir()
        options = {**OPTIONS, "cwd": folder, "env": clean(shared)}
        launchers.append(Popen(["data.path=none", "run.dir=run"], TORCHRUN, **options))
        time.sleep(1)
    for code, output in finish(list(launchers)):
        assert code == 2, output
        [line] = output.splitlines()
        assert line.startswith("run.dir: got ")
        assert "/run, which is not the same folder on " in line
        assert "; allowed: with REQUEUE=1, a folder that all hosts share; put it on a shared file" in line


def test_bounds_without_a_layout(corpus: Path, tmp_path: Path) -> None:
    training = [*LONG, f"data.path={corpus}", "train.steps=4", "parallel.tensor=2", f"run.dir={tmp_path}/run"]
    with job(1, *training, NNODES="1:2", LOG_DIR=str(tmp_path / "logs")) as failing:
        [(code, output)] = failing.finish()
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
    meeting = {"RDZV_ENDPOINT": f"{hosts.address}:29621", "NNODES": "1:2", "NPROC_PER_NODE": "1"}
    launchers = start_on(hosts, *training, **meeting)
    try:
        wait_until(lambda: events(run, "save"))
        hosts.plug(1, "down")
        (code, output), (cut_code, cut) = finish(launchers)
    finally:
        hosts.plug(1, "up")
    assert code == 0, output
    assert "llmtrain: host 1 gave no sign of life: restart 1 of 100, from step " in output
    assert len(losses(run)) == 80
    assert cut_code == 1, cut
    assert "host 0 gave no answer for 30 s: this host ends its ranks" in cut


def test_ranks_stop_together_before_their_time_is_up(corpus: Path, tmp_path: Path) -> None:
    run = tmp_path / "run"
    training = [*LONG, f"data.path={corpus}", f"run.dir={run}", "train.steps=100000", "checkpoint.every=null"]
    ended = on_ranks(2, "train", *training, "train.time_limit=00:00:15")
    assert [done.returncode for done in ended] == [75, 75], ended[0].stderr
    assert "as its time is up in 0:00:" in ended[0].stdout + ended[0].stderr
    [stop] = [event for event in read_events(run / "events.jsonl") if event.kind == "stop"]
    assert (stop.facts, events(run, "save")) == ({"why": "time limit"}, [stop.step])
    assert len(losses(run)) == stop.step
