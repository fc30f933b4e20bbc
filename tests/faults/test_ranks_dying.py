"""A rank that dies takes the others with it, soon and quietly: its own end is told first, nothing is left
behind, and the same command goes on from the last checkpoint."""

from __future__ import annotations

import os
import random
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import psutil
import pytest

from llmtrain.checkpoint.reader import Checkpoint
from llmtrain.checkpoint.retention import list_steps
from tests.faults.test_train_faults import curve, wait_for_step, wait_until_free
from tests.support.training import REPOSITORY, TINY_GPT
from tests.support.warm import PRELUDE, Popen, finish, rank_environment, start, start_ranks

pytestmark = pytest.mark.slow

PATIENCE_SECONDS = 25
"""Less than the 30 s after which torch's agent would kill the ranks that do not end by themselves."""

DEATHS = {
    "os._exit": "os._exit(7)",
    "an exception": "raise MemoryError('no room for another tensor')",
    "a mistake in its data": "raise DataError(Problem('shard 7', 'a damaged file', remedy='copy it again'))",
}
DYING = """
import os, signal
from llmtrain.errors import DataError, Problem

def die(number, frame):
    {death}

signal.signal(signal.SIGUSR2, die)
"""
"""What a rank runs before all else; it then dies of a signal, wherever it is."""


def command(corpus: Path, run: Path, steps: int) -> list[str]:
    settings = [
        *TINY_GPT,
        "device=cpu",
        "data.workers=1",
        "evaluation.at_start=false",
        "evaluation.every=null",
    ]
    settings += ["checkpoint.every=3", "checkpoint.keep_last=2", f"train.steps={steps}"]
    return [*settings, f"data.path={corpus}", f"run.dir={run}"]


class Launch:
    """Ranks under one launcher, from its start to the end of all of them; all start warm (see warm.py) unless
    `is_cold`."""

    def __init__(self, words: list[str], run: Path, is_cold: bool = False, **environment: str) -> None:
        self.run = run
        self.processes: list[psutil.Process] = []
        inherited = {name: value for name, value in os.environ.items() if name not in ("LOG_DIR", "NNODES")}
        options: dict[str, Any] = {
            "cwd": REPOSITORY,
            "env": {**inherited, "OMP_NUM_THREADS": "1", **environment},
            "stdout": subprocess.PIPE,
            "stderr": subprocess.STDOUT,
            "text": True,
        }
        self.launcher: subprocess.Popen[str]
        if is_cold:
            self.launcher = subprocess.Popen([sys.executable, "-m", *words], **options)
        else:
            self.launcher = Popen(words[1:], words[0], **options)

    def rank_at(self, rank: int, step: int) -> psutil.Process:
        """The process of `rank`, once `step` is done."""
        wait_for_step(step, self.run, self.launcher)
        children = psutil.Process(self.launcher.pid).children(recursive=True)
        self.processes = [process for process in children if process.name() != "warm"]
        [found] = [process for process in self.processes if is_rank(process, rank)]
        return found

    def finish(self) -> tuple[int, str]:
        """The launcher's exit code and what it printed; nothing of it may be left."""
        output, _ = self.launcher.communicate(timeout=PATIENCE_SECONDS)
        left = [process for process in self.processes if process.is_running()]
        assert not left, left
        return self.launcher.returncode, output


def is_rank(process: psutil.Process, rank: int) -> bool:
    if process.name().startswith("rank "):
        return process.name() == f"rank {rank}"
    return process.environ().get("RANK") == str(rank) and process.name() not in ("sh", "dash", "bash")


@pytest.fixture
def launches() -> Iterator[list[Launch]]:
    started: list[Launch] = []
    yield started
    for launch in started:
        launch.launcher.kill()
        for process in launch.processes:
            if process.is_running():
                process.kill()


def test_a_killed_rank_is_named_and_the_same_command_resumes(
    corpus: Path, tmp_path: Path, launches: list[Launch]
):
    run, victim, step = tmp_path / "run", random.randrange(4), random.randrange(5, 15)
    words = ["llmtrain.distributed.torchrun", *command(corpus, run, steps=40)]
    launches.append(Launch(words, run, NPROC_PER_NODE="4"))
    launches[0].rank_at(victim, step).send_signal(signal.SIGKILL)
    code, output = launches[0].finish()
    assert code == 137, output
    told = [line for line in output.splitlines() if line.startswith("llmtrain: ") and "rank" in line]
    assert told[0].startswith(f"llmtrain: rank {victim} exited with 137 (killed by SIGKILL"), output
    assert "Traceback" not in output
    kept = list_steps(run / "checkpoints")
    assert kept
    for path in kept:
        assert Checkpoint.open(path).damage() is None

    launches.append(Launch(words, run, NPROC_PER_NODE="4"))
    output = launches[1].launcher.communicate(timeout=300)[0]
    assert launches[1].launcher.returncode == 0, output
    assert sorted(curve(run)) == list(range(1, 41))


@pytest.mark.parametrize("death", DEATHS.values(), ids=DEATHS.keys())
def test_under_plain_torchrun_the_survivors_are_quiet(
    corpus: Path, tmp_path: Path, launches: list[Launch], death: str
):
    run, logs = tmp_path / "run", tmp_path / "logs"
    prelude = tmp_path / "dying.py"
    prelude.write_text(DYING.format(death=death))
    launcher = ["torch.distributed.run", "--nproc-per-node", "3", "--redirects", "3", "--log-dir", str(logs)]
    words = [
        *launcher,
        "-m",
        "llmtrain",
        "train",
        *command(corpus, run, steps=100_000),
        "batch.global_size=6",
    ]
    launches.append(Launch(words, run, **{PRELUDE: str(prelude)}))
    launches[0].rank_at(1, random.randrange(3, 10)).send_signal(signal.SIGUSR2)
    code, output = launches[0].finish()
    assert code != 0
    said = {int(path.parent.name): path.read_text() for path in logs.rglob("stderr.log")}
    assert set(said) == {0, 1, 2}
    for rank in (0, 2):
        assert "Traceback" not in said[rank], said[rank]
    assert ("MemoryError: no room" in said[1]) == ("MemoryError" in death)
    assert ("llmtrain: error: shard 7: got a damaged file; copy it again" in said[1]) == (
        "DataError" in death
    )
    assert f"exitcode  : {dict(zip(DEATHS.values(), (7, 1, 2), strict=True))[death]}" in output


@pytest.mark.parametrize("launcher", ["llmtrain.distributed.torchrun", "torch.distributed.run"])
def test_ranks_end_with_a_killed_launcher(
    corpus: Path, tmp_path: Path, launches: list[Launch], launcher: str
):
    run = tmp_path / "run"
    words = [launcher, *command(corpus, run, steps=100_000)]
    if launcher == "torch.distributed.run":
        words[1:1] = ["--nproc-per-node", "2", "-m", "llmtrain", "train"]
    is_cold = launcher == "llmtrain.distributed.torchrun"
    launches.append(Launch(words, run, is_cold=is_cold, NPROC_PER_NODE="2"))
    launches[0].rank_at(0, 3)
    launches[0].launcher.kill()
    gone, left = psutil.wait_procs(launches[0].processes, timeout=60)
    assert not left
    assert len(gone) >= 2
    wait_until_free(run)
    said = launches[0].launcher.communicate()[0]
    if launcher == "llmtrain.distributed.torchrun":
        said = "".join((run / f"logs/rank{rank}.log").read_text() for rank in (0, 1))
    for rank in (0, 1):
        assert said.count(f"llmtrain: error: rank {rank}: got a launcher (process ") == 1, said


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGUSR1, signal.SIGINT, signal.SIGHUP])
def test_a_launcher_that_is_asked_to_stop_lets_its_ranks_save(
    corpus: Path,
    tmp_path: Path,
    launches: list[Launch],
    number: signal.Signals,
    request: pytest.FixtureRequest,
):
    # Tests that run under nohup would hand on that it is ignored.
    before = signal.signal(signal.SIGHUP, signal.SIG_DFL)
    request.addfinalizer(lambda: signal.signal(signal.SIGHUP, before))
    run = tmp_path / "run"
    words = ["llmtrain.distributed.torchrun", *command(corpus, run, steps=100_000), "checkpoint.every=null"]
    launches.append(Launch(words, run, NPROC_PER_NODE="2"))
    launches[0].rank_at(0, 3)
    launches[0].launcher.send_signal(number)
    code, output = launches[0].finish()
    assert code == 75, output
    [kept] = list_steps(run / "checkpoints")
    stop = f"stopped at step {Checkpoint.open(kept).step:,} as asked; run the same command to resume"
    assert stop in output
    assert "exited with" not in output


def test_a_launcher_kills_ranks_that_take_too_long(corpus: Path, tmp_path: Path, launches: list[Launch]):
    run = tmp_path / "run"
    words = ["llmtrain.distributed.torchrun", *command(corpus, run, steps=100_000)]
    launches.append(Launch(words, run, NPROC_PER_NODE="2", STOP_TIMEOUT="0.5"))
    launches[0].rank_at(1, 3).send_signal(signal.SIGSTOP)
    launches[0].launcher.terminate()
    code, output = launches[0].finish()
    assert code == 137, output
    assert "killing 2 ranks that did not exit in time" in output, output


def test_without_a_launcher_the_survivors_say_why_they_end(corpus: Path, tmp_path: Path):
    run = tmp_path / "run"
    ranks = start_ranks(4, "train", *command(corpus, run, steps=100_000), "batch.micro_size=1")
    try:
        wait_for_step(3, run, ranks[0])
        ranks[1].kill()
        for rank in (0, 2, 3):
            _, said = ranks[rank].communicate(timeout=PATIENCE_SECONDS)
            assert ranks[rank].returncode == 1, said
            assert "Traceback" not in said
            [told] = [line for line in said.splitlines() if line.startswith("llmtrain: error: ")]
            assert told.startswith(f"llmtrain: error: rank {rank}: got a lost connection to another rank (")
            assert told.endswith("; that process ended; its own message tells why")
    finally:
        for rank in ranks:
            rank.kill()


def test_ranks_leave_with_the_code_they_mean():
    """Interpreter shutdown among gloo's threads aborts now and then, so ranks do without it."""
    ports = [rank_environment(4)["MASTER_PORT"] for _ in range(10)]
    [done] = finish([start(*ports, program="tests.support.leaving")], timeout=240)
    assert done.stdout.splitlines() == ["2 2 2 2", "0 0 0 0"] * 5, done.stderr
