"""Tracker that writes metrics.jsonl: one JSON object per line, written before training continues."""

from __future__ import annotations

import errno
import json
import math
import os
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from llmtrain import files
from llmtrain.config import LARGEST_INT
from llmtrain.errors import TrainingError
from llmtrain.reading import parse_object
from llmtrain.track.base import Metrics, WrittenText

METRICS_BYTES = 4 << 30
"""Maximum size of a metrics file that is read: more than ten million steps."""
LONGEST_LINE = 1 << 20
"""Maximum bytes of a line that is read; a step has some hundreds."""


class JsonlTracker:
    """Appends {"step": …, metric: value, …}; values that are not finite become null.

    On resume it first removes, atomically, the lines after `resume_step` and an incomplete last line, as a
    killed run leaves it; a new run (None) removes all lines.
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

    def show(self, step: int, pictures: Mapping[str, bytes]) -> None:
        """Record nothing: pictures lie beside the file."""

    def write(self, step: int, texts: Sequence[WrittenText]) -> None:
        """Record nothing: texts lie beside the file."""

    def state(self) -> dict[str, Any]:
        os.fsync(self._file)
        return {}

    def alert(self, title: str, text: str) -> None:
        """Do nothing: no one is there to be told."""

    def keep(self, step: int, checkpoint: Path) -> None:
        """Do nothing: checkpoints lie in the run folder."""

    def close(self, failed: bool) -> None:
        os.fsync(self._file)
        os.close(self._file)


def read_metrics(path: Path, last_bytes: int | None = None) -> Iterator[dict[str, Any]]:
    """Yield the records of a metrics file in order, without damaged lines; none if the file is missing.
    Values are numbers, strings or null.

    last_bytes: read only so much of its end; None: all of it.

    Raise OSError if the file is larger than METRICS_BYTES.
    """
    if not path.exists():
        return
    with open(path, "rb", opener=files.open_regular) as file:
        if (size := os.fstat(file.fileno()).st_size) > METRICS_BYTES:
            raise OSError(errno.EINVAL, f"a file of {size:,} bytes, more than {METRICS_BYTES:,}", str(path))
        if last_bytes is not None and size > last_bytes:
            file.seek(size - last_bytes)
            file.readline(LONGEST_LINE)  # the rest of a line
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
    remedy = "free disk space, then resume from the last checkpoint"
    return TrainingError(files.disk_problem(error, path, if_full=remedy))
