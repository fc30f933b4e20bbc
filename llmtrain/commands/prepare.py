"""`llmtrain prepare`: raw text → tokenizer and corpus."""

from __future__ import annotations

import os
import re
from collections.abc import Mapping
from dataclasses import replace
from typing import Any

from llmtrain.config import decode
from llmtrain.distributed import launcher
from llmtrain.prepare.config import PrepareConfig
from llmtrain.prepare.job import prepare


def run(mapping: Mapping[str, Any]) -> None:
    """Prepare the corpus. Raise UserError for whatever a user can fix."""
    _take_slurm_task()
    config = decode(PrepareConfig, mapping)
    if config.workers is None:
        # Processes of one host share the cores, unless the launcher bound each to its own.
        cores = min(len(os.sched_getaffinity(0)), (os.cpu_count() or 1) // _local_size())
        config = replace(config, workers=max(1, cores))
    prepare(config, launcher.rank(), launcher.world_size(), _job())


def _take_slurm_task() -> None:
    """Treat a task of `srun` as a process of the job, as with torchrun.

    SLURM_STEP_NUM_TASKS tells a task from a batch script, which runs once however many tasks the job has.
    """
    tasks = os.environ.get("SLURM_STEP_NUM_TASKS", "1")
    if tasks != "1" and "WORLD_SIZE" not in os.environ:
        os.environ["WORLD_SIZE"] = tasks
        os.environ["RANK"] = os.environ.get("SLURM_PROCID", "")
        os.environ["LOCAL_RANK"] = os.environ.get("SLURM_LOCALID", "")


def _local_size() -> int:
    """Return the number of processes of the job on this host."""
    text = os.environ.get("LOCAL_WORLD_SIZE") or os.environ.get("SLURM_STEP_TASKS_PER_NODE", "1")
    # Slurm writes 4(x2) for two hosts of four tasks; where hosts differ, tasks are bound to cores anyway.
    count = re.match(r"\d+", text)
    return max(1, int(count[0])) if count else 1


def _job() -> str:
    """Return what distinguishes this job's processes from those of another with the same output folder."""
    slurm = ["SLURM_JOB_ID", "SLURM_STEP_ID"]
    torchrun = ["TORCHELASTIC_RUN_ID", "TORCHELASTIC_RESTART_COUNT", "MASTER_ADDR", "MASTER_PORT"]
    return " ".join(os.environ.get(name, "") for name in slurm + torchrun)
