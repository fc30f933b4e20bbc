"""One job of launch/slurm.sbatch with REQUEUE=1 on a real Slurm: preempted, its node set down, its time cut,
and cancelled. Its curve and its trackers are those of a run that nothing disturbed."""

from __future__ import annotations

import subprocess
import time
from collections.abc import Callable, Mapping
from pathlib import Path

import pytest

from llmtrain.track.events import read_events
from tests.faults.test_launch_slurm import Job, cluster, warm, warm_processes
from tests.faults.test_launch_torchrun import TRAINING, losses, wait_for_first_step
from tests.support.warm import PRELUDE, rank_environment, start
from tests.unit.track.test_wandb import history_of, records

__all__ = ["cluster", "warm"]
pytestmark = pytest.mark.slow

ENDLESS = (
    *TRAINING,
    "train.steps=100000",
    "checkpoint.every=20",
    "evaluation.at_start=false",
    "engine=local",
)
UNHURRIED = """
import time
from llmtrain.watch import watch

own = watch.after_step

def after_step():
    own()
    time.sleep(0.1)

watch.after_step = after_step
"""
"""The job waits for Slurm a minute in all; at full speed it would take thousands of steps meanwhile, all of
which are computed again and compared."""


def wait_until(what: str, is_true: Callable[[], object], job: Job, seconds: float = 100) -> None:
    deadline = time.monotonic() + seconds
    while not is_true():
        assert time.monotonic() < deadline, f"{what}: {job.output()[-3000:]}"
        time.sleep(0.2)


def starts(run: Path) -> int:
    return sum(event.kind == "start" for event in read_events(run / "events.jsonl"))


def steps(run: Path) -> int:
    return len(losses(run))


def shown(job: Job) -> str:
    command = ["scontrol", "show", "job", job.id]
    return subprocess.run(command, env=job.environment, capture_output=True, text=True).stdout


def has_gone_on(run: Path, number: int, job: Job) -> None:
    """Wait until the job has taken a step in its start `number`."""
    wait_until(f"start {number}", lambda: starts(run) == number, job)
    before = [event.step or 0 for event in read_events(run / "events.jsonl") if event.kind == "start"][-1]
    wait_until("a step", lambda: steps(run) > before + 2, job)


@pytest.mark.long("a requeued job waits some ten seconds for its nodes, three times")
def test_a_job_goes_on_after_all_that_a_cluster_does_to_it(
    warm: Mapping[str, str], corpus: Path, tmp_path: Path
) -> None:
    run, prelude = tmp_path / "run", tmp_path / "prelude.py"
    prelude.write_text(UNHURRIED)

    def slurm(*command: str) -> None:
        subprocess.run(command, env=job.environment, cwd=tmp_path, check=True, capture_output=True)

    overrides = [*ENDLESS, f"data.path={corpus}", "run.dir=run", "track=[jsonl,tensorboard,wandb]"]
    settings = {"REQUEUE": "1", "MAX_STARTS": "2", "WANDB_MODE": "offline", PRELUDE: str(prelude)}
    job = Job(warm, tmp_path, *overrides, **settings)
    wait_for_first_step(run)
    slurm("sbatch", "--partition=urgent", "--nodes=2", "--exclusive", "--output=/dev/null", "--wrap=sleep 1")
    has_gone_on(run, 2, job)
    slurm("scontrol", "update", "NodeName=node2", "State=DOWN", "Reason=test")
    wait_until("its end", lambda: not warm_processes(), job)
    # A node that answers comes back by itself, perhaps before this.
    subprocess.run(["scontrol", "update", "NodeName=node2", "State=RESUME"], env=job.environment, check=False)
    has_gone_on(run, 3, job)
    slurm("scontrol", "update", f"JobId={job.id}", "TimeLimit=1")
    wait_until("its end", lambda: not warm_processes(), job)
    # The limit stays with the job: on a busy machine its next start might take no step within it.
    more = ["scontrol", "update", f"JobId={job.id}", "TimeLimit=60"]
    wait_until("more time", lambda: subprocess.run(more, env=job.environment).returncode == 0, job)
    has_gone_on(run, 4, job)
    slurm("scancel", job.id)
    wait_until("its end", lambda: not warm_processes(), job)
    wait_until("cancelled", lambda: "JobState=CANCELLED" in shown(job), job)
    time.sleep(3)
    assert not warm_processes(), "what is cancelled stays so"

    assert starts(run) == 4
    # Of a node that is down Slurm requeues the job itself, perhaps before the script says that it does.
    assert job.output().count("exit code 75: requeued") in (2, 3)
    found = losses(run)
    undisturbed = tmp_path / "undisturbed"
    assert found == reference(undisturbed, corpus, len(found)), "bit for bit"
    each = list(range(1, len(found) + 1))
    assert board(run / "tensorboard") == each
    told = records(run)
    logged = {item["step"]: item["loss"] for item in history_of(told) if "loss" in item}
    assert list(logged) == each, "all starts of the job are one run of W&B, which has each step once"
    assert list(logged.values()) == found
    assert len({record["run"]["run_id"] for record in told if record["type"] == "run"}) == 1


def reference(run: Path, corpus: Path, count: int) -> list[float]:
    """The first losses of the same training that nothing disturbs, on two ranks without a launcher."""
    words = ["train", *ENDLESS, f"data.path={corpus}", f"run.dir={run}", "checkpoint.every=null"]
    shared = rank_environment(2)
    ranks = [start(*words, **shared, RANK=str(rank), LOCAL_RANK=str(rank)) for rank in range(2)]
    try:
        wait_for_first_step(run)
        while steps(run) < count:
            time.sleep(0.2)
    finally:
        for rank in ranks:
            rank.kill()
            rank.communicate()
    return losses(run)[:count]


def board(folder: Path) -> list[int]:
    """The steps of the loss, as TensorBoard shows them."""
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    found = EventAccumulator(str(folder), size_guidance={"scalars": 0})
    found.Reload()
    return [event.step for event in found.Scalars("loss")]


def test_a_mistake_is_not_requeued(warm: Mapping[str, str], corpus: Path, tmp_path: Path) -> None:
    mistakes = {"MAX_STARTS": "none", "REQUEUE": "1"}
    job = Job(warm, tmp_path, *ENDLESS, f"data.path={corpus}", "run.dir=run", **mistakes)
    assert job.exit_code() == 2, job.output()
    assert "MAX_STARTS: got 'none'; allowed: 1 or more" in job.output()
    job = Job(
        warm, tmp_path, *ENDLESS, f"data.path={corpus}", "run.dir=run", "model.num_leyers=2", REQUEUE="1"
    )
    assert job.exit_code() == 2, job.output()
    assert "not requeued: exit code 2 is a mistake in its settings" in job.output()


def test_a_job_that_only_crashes_is_requeued_no_more(
    warm: Mapping[str, str], corpus: Path, tmp_path: Path
) -> None:
    prelude = tmp_path / "prelude.py"
    prelude.write_text("import os\nif 'RANK' in os.environ:\n    os._exit(9)\n")
    crashes = {"REQUEUE": "1", "MAX_STARTS": "2", PRELUDE: str(prelude)}
    job = Job(warm, tmp_path, *ENDLESS, f"data.path={corpus}", "run.dir=run", **crashes)
    assert job.exit_code() == 9, job.output()
    assert job.output().count("exit code 9: requeued") == 1
    assert job.output().count("not requeued: 2 starts of the job saved no step beyond 0 (MAX_STARTS)") == 1
