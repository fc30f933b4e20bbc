"""When the job began, and when the time that a scheduler gave it ends. Seconds since 1970."""

from __future__ import annotations

import math
import os
import time

import psutil

STARTED = "LLMTRAIN_JOB_STARTED"
"""Variable by which a launcher tells its ranks when it began: the ranks of a restart are of the same job."""
SLURM_END = "SLURM_JOB_END_TIME"


def started() -> float:
    """Return when the launcher of this process began, or this process where no launcher tells."""
    told = _moment(os.environ.get(STARTED))
    return psutil.Process().create_time() if told is None else told


def tell_ranks() -> None:
    """Tell the processes that this one will start when the job began."""
    os.environ[STARTED] = str(started())


def scheduled_end() -> float | None:
    """Return when Slurm ends this job; None without Slurm."""
    return _moment(os.environ.get(SLURM_END))


def left_until(end: float | None) -> float:
    """Return the seconds until `end`; infinity for None."""
    return math.inf if end is None else end - time.time()


def _moment(text: str | None) -> float | None:
    try:
        found = float(text or "nan")
    except ValueError:
        return None
    return found if 0 < found < math.inf else None
