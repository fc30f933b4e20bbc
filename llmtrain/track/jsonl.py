"""metrics.jsonl: one JSON object a line, each whole on disk before training goes on."""

from __future__ import annotations

import errno
import json
import math
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from llmtrain import files
from llmtrain.config import LARGEST_INT
from llmtrain.errors import TrainingError
from llmtrain.reading import parse_object
from llmtrain.track.base import Metrics

METRICS_BYTES = 4 << 30
"""More than ten million steps."""
LONGEST_LINE = 1 << 20
"""Bytes; a step has some hundreds."""


class JsonlTracker:
    """Appends {"step": …, metric: value, …}; a value that is not finite is null.

    A resumed run first drops, atomically, the lines past `resume_step` and a torn last line, which a
    killed run leaves; a fresh run (None) drops all.
    """

    def __init__(self, path: Path, resume_step: int | None) -> None:
        self._path = path
        try:
            _keep_up_to(path, -1 if resume_step is None else resume_step)
            self._file = os.open(path, os.O_WRONLY | os.O_APPEND | os.O_CREAT | os.O_NOFOLLOW, 0o644)
        except OSError as error:
            raise _disk_error(path, error) from error

    def log(self, step: int, metrics: Metrics) -> None:
        values = {name: _finite(value) for name, value in metrics.items()}
        line = (json.dumps({"step": step, **values}, allow_nan=False) + "\n").encode()
        try:
            while line:
                line = line[os.write(self._file, line) :]
        except OSError as error:
            if files.is_disk_full(error):
                raise _disk_error(self._path, error) from error
            raise

    def state(self) -> dict[str, Any]:
        os.fsync(self._file)
        return {}

    def close(self, failed: bool) -> None:
        os.fsync(self._file)
        os.close(self._file)


def read_metrics(path: Path) -> Iterator[dict[str, Any]]:
    """The whole lines of a metrics file in order, each with a step; a torn line is left out, a missing file
    is empty. Values are numbers, texts or null."""
    if not path.exists():
        return
    with open(path, "rb", opener=files.open_regular) as file:
        if (size := os.fstat(file.fileno()).st_size) > METRICS_BYTES:
            raise OSError(errno.EINVAL, f"a file of {size:,} bytes, more than {METRICS_BYTES:,}", str(path))
        while line := file.readline(LONGEST_LINE):
            try:
                record = parse_object(line)
            except ValueError:
                continue
            if (
                line.endswith(b"\n")
                and type(record.get("step")) is int
                and 0 <= record["step"] <= LARGEST_INT
            ):
                yield {name: value for name, value in record.items() if not isinstance(value, (dict, list))}


def _keep_up_to(path: Path, last_step: int) -> None:
    """Rewrite `path` atomically with its records up to `last_step`."""
    if not path.exists():
        return
    with files.atomic_writer(path) as kept:
        for record in read_metrics(path):
            if record["step"] <= last_step:
                kept.write(json.dumps(record).encode() + b"\n")


def _finite(value: Any) -> Any:
    if isinstance(value, (str, bool, int)):
        return value
    number = float(value)
    return number if math.isfinite(number) else None


def _disk_error(path: Path, error: OSError) -> TrainingError:
    remedy = "make room, then resume from the last checkpoint"
    return TrainingError(files.disk_problem(error, path, if_full=remedy))
