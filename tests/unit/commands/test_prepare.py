"""`llmtrain prepare` takes its place among the processes of a job from what the launcher says."""

import os

import pytest

from llmtrain.commands import prepare as command
from llmtrain.prepare.config import PrepareConfig

Started = list[tuple[PrepareConfig, int, int, str]]
MAPPING = {"source": ["a.txt"], "output": "corpus"}


@pytest.fixture
def started(monkeypatch: pytest.MonkeyPatch) -> Started:
    """What `prepare` is called with, in an environment without a launcher and on 8 cores."""
    for name in list(os.environ):
        if name.startswith(("SLURM_", "TORCHELASTIC_", "MASTER_")) or name.endswith(("RANK", "WORLD_SIZE")):
            monkeypatch.delenv(name)
    calls: Started = []
    monkeypatch.setattr(command, "prepare", lambda *arguments: calls.append(arguments))
    monkeypatch.setattr(os, "cpu_count", lambda: 8)
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: set(range(8)))
    # What the command sets is undone too.
    for name in ("RANK", "WORLD_SIZE", "LOCAL_RANK"):
        monkeypatch.setenv(name, "")
        monkeypatch.delenv(name)
    return calls


def test_alone_it_takes_all_cores(started: Started):
    command.run(MAPPING)
    command.run({**MAPPING, "workers": 3})
    assert [(config.workers, rank, size) for config, rank, size, _ in started] == [(8, 0, 1), (3, 0, 1)]


def test_processes_of_torchrun_share_the_cores_of_their_host(
    started: Started, monkeypatch: pytest.MonkeyPatch
):
    environment = {"RANK": "5", "WORLD_SIZE": "6", "LOCAL_RANK": "1", "LOCAL_WORLD_SIZE": "3"}
    for name, value in {**environment, "TORCHELASTIC_RUN_ID": "run", "MASTER_PORT": "29500"}.items():
        monkeypatch.setenv(name, value)
    command.run(MAPPING)
    ((config, rank, size, job),) = started
    assert (config.workers, rank, size) == (2, 5, 6)
    monkeypatch.setenv("TORCHELASTIC_RESTART_COUNT", "1")
    command.run(MAPPING)
    assert started[1][3] != job, "a restarted job is another one"


@pytest.mark.parametrize(
    ("tasks_per_node", "cores", "workers"), [("4(x2)", 8, 2), ("1(x2)", 4, 4), ("16", 8, 1)]
)
def test_tasks_of_srun(
    started: Started, monkeypatch: pytest.MonkeyPatch, tasks_per_node: str, cores: int, workers: int
):
    environment = {"SLURM_PROCID": "3", "SLURM_STEP_NUM_TASKS": "8", "SLURM_LOCALID": "3"}
    for name, value in {**environment, "SLURM_STEP_TASKS_PER_NODE": tasks_per_node}.items():
        monkeypatch.setenv(name, value)
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: set(range(cores)))
    command.run(MAPPING)
    ((config, rank, size, _),) = started
    assert (config.workers, rank, size) == (workers, 3, 8)


def test_a_batch_script_is_one_process_however_many_tasks_its_job_has(
    started: Started, monkeypatch: pytest.MonkeyPatch
):
    for name, value in {"SLURM_PROCID": "0", "SLURM_NTASKS": "8", "SLURM_JOB_ID": "1"}.items():
        monkeypatch.setenv(name, value)
    command.run(MAPPING)
    assert started[0][1:3] == (0, 1)


def test_torchrun_in_a_task_of_srun_goes_before_it(started: Started, monkeypatch: pytest.MonkeyPatch):
    environment = {"SLURM_PROCID": "1", "SLURM_STEP_NUM_TASKS": "2", "RANK": "2", "WORLD_SIZE": "4"}
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    command.run(MAPPING)
    assert started[0][1:3] == (2, 4)
