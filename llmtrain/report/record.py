"""A run folder read as a whole: configuration, metrics, events and checkpoints. Nothing is written."""

from __future__ import annotations

import errno
import fcntl
import os
import platform
import re
import time
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from llmtrain.checkpoint.names import MANIFEST
from llmtrain.errors import CheckpointError, Problem
from llmtrain.files import open_regular
from llmtrain.reading import parse_object, parse_yaml, read_bytes
from llmtrain.track.events import ENDS, EVENTS, Event, read_events
from llmtrain.track.jsonl import read_metrics

RECORD_BYTES = 1 << 20
"""Largest accepted size of a file that describes a run; usual ones have some thousand bytes."""
METRICS, CONFIG, LOCK = "metrics.jsonl", "config.yaml", ".lock"
SILENT_SECONDS = 120.0
"""A run that holds its folder is silent if no step ends for so long, or for SILENT_STEPS of its steps."""
SILENT_STEPS = 20
RENEWED_SECONDS = 25.0
"""A run renews the note in its lock each ten seconds; an older one is of a process that has ended."""
_NOTE = re.compile(r"process \d+ on (.+)")


@dataclass(frozen=True)
class Series:
    """Values of one metric; steps ascend."""

    steps: list[int]
    values: list[float]


@dataclass(frozen=True)
class Saved:
    """A checkpoint of the run."""

    step: int
    path: Path
    seconds_ago: float


@dataclass(frozen=True)
class RunRecord:
    """A run as its folder records it."""

    path: Path
    config: Mapping[str, Any]
    environment: Mapping[str, Any]
    data: Mapping[str, Any]
    series: Mapping[str, Series]
    events: list[Event]
    saved: list[Saved]
    holder: str | None
    """The process that holds the folder; None: no process does."""
    silent_for: float | None
    """Seconds since the last step ended; None before the first."""

    @property
    def name(self) -> str:
        """Return the name that the run has in its trackers, or its folder's."""
        run = self.config.get("run")
        named = run.get("name") if isinstance(run, Mapping) else None
        return str(named or self.path.name)

    @property
    def steps(self) -> int | None:
        """Return the number of steps that the run is to take."""
        section = self.config.get("train")
        found = section.get("steps") if isinstance(section, Mapping) else None
        return found if type(found) is int else None

    @property
    def step(self) -> int:
        """Return the last step that was recorded."""
        loss = self.series.get("loss")
        steps = [] if loss is None else loss.steps
        return max([*steps[-1:], *(saved.step for saved in self.saved[-1:])], default=0)

    @property
    def state(self) -> str:
        """Return one of starting, running, silent, finished, failed, stopped."""
        last = next((event.kind for event in reversed(self.events) if event.kind in ENDS), None)
        if self.holder is not None:
            if last != "start" or self.silent_for is None:
                return "starting"
            a_step = self.seconds_per_step or 0.0
            return "silent" if self.silent_for > max(SILENT_SECONDS, SILENT_STEPS * a_step) else "running"
        reached = self.steps is not None and any(saved.step >= self.steps for saved in self.saved)
        if last == "done" or reached:
            return "finished"
        return "failed" if last == "fail" else "stopped"

    @property
    def seconds_per_step(self) -> float | None:
        """Return the mean time of a step since the last start, evaluations and checkpoints included."""
        start = next((event for event in reversed(self.events) if event.kind == "start"), None)
        if start is None or self.silent_for is None or start.step is None or self.step <= start.step:
            return None
        return max(0.0, time.time() - self.silent_for - start.at) / (self.step - start.step)

    @property
    def seconds_left(self) -> float | None:
        """Return the time that the remaining steps take at the pace so far, of a run that goes on."""
        a_step = self.seconds_per_step
        if self.holder is None or a_step is None or self.steps is None:
            return None
        return a_step * max(0, self.steps - self.step)

    def last(self, name: str) -> float | None:
        """Return the last value of a metric."""
        found = self.series.get(name)
        return found.values[-1] if found is not None and found.values else None


def read_run(path: Path, last_bytes: int | None = None) -> RunRecord:
    """Read a run folder. Raise CheckpointError for a folder in which no run ever started.

    last_bytes: of the metrics read only so much of their end; None: all."""
    if not (path / CONFIG).exists():
        got = f"{path}, " + ("a folder in which no run started" if path.is_dir() else "no such folder")
        raise CheckpointError(Problem("run", got, "a run folder, with config.yaml and metrics.jsonl"))
    metrics = path / METRICS
    age = time.time() - metrics.stat().st_mtime if metrics.exists() and metrics.stat().st_size else None
    return RunRecord(
        path,
        _described(path / CONFIG),
        _described(path / "environment.json"),
        _described(path / "data.json"),
        _series(metrics, last_bytes),
        read_events(path / EVENTS),
        _saved(path),
        _holder(path / LOCK),
        age,
    )


def _described(path: Path) -> Mapping[str, Any]:
    if not path.exists():
        return {}
    try:
        content = read_bytes(path, RECORD_BYTES)
        found = parse_yaml(content) if path.suffix == ".yaml" else parse_object(content)
    except (OSError, ValueError) as error:
        said = getattr(error, "strerror", None) or error
        raise CheckpointError(Problem(str(path), f"an unreadable file ({said})")) from error
    return found if isinstance(found, Mapping) else {}


def _series(path: Path, last_bytes: int | None) -> dict[str, Series]:
    found: dict[str, Series] = {}
    try:
        for record in read_metrics(path, last_bytes):
            for name, value in record.items():
                if name != "step" and type(value) in (int, float):
                    series = found.setdefault(name, Series([], []))
                    series.steps.append(record["step"])
                    series.values.append(value)
    except OSError as error:
        raise CheckpointError(Problem(str(path), str(error.strerror))) from error
    return found


def _saved(path: Path) -> list[Saved]:
    now, found = time.time(), []
    for manifest in sorted(path.glob(f"checkpoints/step-*/{MANIFEST}")):
        with suppress(OSError, ValueError):  # one that is deleted meanwhile
            ago = max(0.0, now - manifest.stat().st_mtime)
            found.append(Saved(int(manifest.parent.name.split("-")[1]), manifest.parent, ago))
    return found


def _holder(path: Path) -> str | None:
    """Return the note in a run's lock by the process that holds it; None if no process holds it.

    The lock is tried, shared, for a moment: a run that starts then tries once more. Where a network file
    system keeps locks to one host, the note that a process of another host renews tells of it."""
    try:
        with open(path, encoding="utf-8", errors="replace", opener=open_regular) as file:
            note = os.pread(file.fileno(), 200, 0).decode(errors="replace").strip()
            age = abs(time.time() - os.fstat(file.fileno()).st_mtime)
            try:
                fcntl.flock(file, fcntl.LOCK_SH | fcntl.LOCK_NB)
            except OSError as error:
                if error.errno in (errno.EWOULDBLOCK, errno.EAGAIN):
                    return note or "a process"
            found = _NOTE.fullmatch(note)
            is_elsewhere = found is not None and found[1] != platform.node()
            return note if is_elsewhere and age < RENEWED_SECONDS else None
    except OSError:
        return None
