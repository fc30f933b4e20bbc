"""Stop a run before its time is up, early enough that its save is complete.

A scheduler ends a job without regard to the time that a save takes. So the run measures that time, and the
longest time between two checks of the loop: a step, or whatever else runs between them.
"""

from __future__ import annotations

import os
import re
import time
from collections.abc import Callable
from functools import lru_cache
from pathlib import Path

from llmtrain.distributed import job_time
from llmtrain.distributed.restarts import ATTEMPT
from llmtrain.errors import ConfigError, Problem
from llmtrain.track.events import EVENTS, Event, read_events
from llmtrain.track.progress import duration

KEY = "train.time_limit"
ALLOWED = "HH:MM:SS, D-HH:MM:SS or seconds, more than 0; or null"
SAVES = 2
"""Number of saves that time is reserved for: one may be being written when the run is asked to stop."""
CLOSING_SECONDS = 5.0
"""Seconds reserved for the rest: ranks agree, trackers are closed, processes end."""
UPLOAD_SECONDS = 10.0
"""How long a run that stops waits for its copy elsewhere (checkpoint.remote)."""
FIRST_SAVE_SECONDS = 300.0
"""Assumed duration of a save until one is measured, but at most FIRST_SAVE_SHARE of the time left."""
FIRST_SAVE_SHARE = 0.25

_FORM = re.compile(r"(?:(?:(\d{1,4})-)?(\d{1,5}):([0-5]?\d):([0-5]?\d)|(\d{1,9}(?:\.\d*)?))", re.ASCII)


def seconds_of(text: str) -> float | None:
    """Return the seconds of HH:MM:SS, D-HH:MM:SS or a number of seconds; None for anything else."""
    found = _FORM.fullmatch(text.strip())
    if found is None:
        return None
    days, hours, minutes, seconds, plain = found.groups()
    if plain is not None:
        return float(plain)
    return float((int(days or 0) * 24 + int(hours)) * 3600 + int(minutes) * 60 + int(seconds))


def end_of(limit: str | None) -> float | None:
    """Return when the run's time is up, in seconds since 1970: so long after the start of the job, or where
    nothing is set, when Slurm ends it; None: never."""
    seconds = None if limit is None else seconds_of(limit)
    return job_time.scheduled_end() if seconds is None else job_time.started() + seconds


def refuse_if_too_short(
    limit: str | None, run_folder: Path, steps: int | None, uploads: bool = False
) -> None:
    """Raise ConfigError if the time of the job is too short for two saves of this run and the end.

    Where it is long enough but nearly over, as after a restart, nothing is refused: the run stops at its
    first question, which one process alone asks.

    steps: those of the whole run, after which nothing is left to do; None: not known yet. uploads: whether
    the run has a copy elsewhere."""
    end = end_of(limit)
    last = last_save(run_folder) if end is not None else None
    if end is None or last is None or (steps is not None and (last.step or 0) >= steps):
        return
    took, total = float(last.facts["seconds"]), end - job_time.started()
    needed = SAVES * took + CLOSING_SECONDS + (UPLOAD_SECONDS if uploads else 0.0)
    is_restart = os.environ.get(ATTEMPT, "1") != "1"
    if total < needed and not is_restart:
        given = "of Slurm" if limit is None else limit
        left = max(0.0, end - time.time())
        raise ConfigError(
            Problem(
                KEY,
                f"{given}, of which {left:.1f} s are left, while a save of this run took {took:.1f} s",
                f"more than {needed:.1f} s after the start",
                f"give the job more time, or set {KEY} to what it has",
            )
        )


def last_save(run_folder: Path) -> Event | None:
    """Return the last save of a run whose duration was recorded."""
    path = run_folder / EVENTS
    try:
        status = path.stat()
    except OSError:
        return None
    return _last_save(path, status.st_size, status.st_mtime_ns)


@lru_cache(maxsize=1)
def _last_save(path: Path, _size: int, _changed: int) -> Event | None:
    """Read a file of events once for the questions of one start; it may have millions of lines."""
    timed = (
        event
        for event in reversed(read_events(path))
        if event.kind == "save" and type(event.facts.get("seconds")) in (int, float)
    )
    return next(timed, None)


class TimeLimit:
    """Tells when to stop. Only one process may ask: clocks differ."""

    def __init__(
        self,
        end: float | None,
        save_seconds: float | None = None,
        clock: Callable[[], float] = time.time,
        *,
        uploads: bool = False,
    ) -> None:
        """end: when the time is up, by `clock`; None: never. save_seconds: what a save took before. uploads:
        whether the run has a copy elsewhere."""
        self._end, self._clock = end, clock
        self._save_seconds = save_seconds
        self._assumed = 0.0
        self._upload = UPLOAD_SECONDS if uploads else 0.0
        self._longest_gap = 0.0
        self._asked_at: float | None = None
        self._questions = 0
        self.is_over = False
        """Whether it has told to stop."""
        if end is not None:
            share = max(0.0, FIRST_SAVE_SHARE * (end - clock()))
            self._upload = min(self._upload, share)
            if save_seconds is None:
                self._assumed = min(FIRST_SAVE_SECONDS, share)

    @classmethod
    def of_run(cls, limit: str | None, run_folder: Path, uploads: bool = False) -> TimeLimit:
        """Return the limit of a run whose earlier saves are recorded in its folder."""
        end = end_of(limit)
        last = None if end is None else last_save(run_folder)
        took = None if last is None else float(last.facts["seconds"])
        return cls(end, took, uploads=uploads)

    def saved(self, seconds: float) -> None:
        """Record the duration of a save, from its beginning until it was complete."""
        self._save_seconds = max(seconds, self._save_seconds or 0.0)

    def asks_to_stop(self) -> bool:
        """Return whether to stop now. The time between two calls counts as what cannot be interrupted."""
        if self._end is None or self.is_over:
            return self.is_over
        now = self._clock()
        if self._asked_at is not None:
            self._questions += 1
            if self._questions > 1:  # the first step also warms up
                self._longest_gap = max(self._longest_gap, now - self._asked_at)
        self._asked_at = now
        self.is_over = self._end - now <= self.needed_seconds
        return self.is_over

    @property
    def needed_seconds(self) -> float:
        """How long before the end of its time the run has to stop."""
        save = self._assumed if self._save_seconds is None else SAVES * self._save_seconds
        return save + self._longest_gap + self._upload + CLOSING_SECONDS

    def upload_seconds(self) -> float:
        """Return how long a run that stops now may wait for its copy elsewhere."""
        if self._end is None:
            return self._upload
        return max(0.0, min(self._upload, self._end - self._clock() - CLOSING_SECONDS))

    def why(self) -> str:
        """Return why the run stopped: because its time is nearly up, or else because it was asked to."""
        if not self.is_over or self._end is None:
            return "asked"
        left = duration(max(0.0, self._end - self._clock()))
        return f"its time is up in {left}, of which saving and ending may take {self.needed_seconds:.0f} s"
