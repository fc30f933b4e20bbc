"""End a job: write the report, the event and the exit line, and end the processes of this host."""

from __future__ import annotations

import json
import os
import shutil
import signal
import threading
import time
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path
from typing import NoReturn

from llmtrain import files
from llmtrain.errors import WATCH_EXIT_CODE, Problem
from llmtrain.track.events import note_event
from llmtrain.watch import kernel
from llmtrain.watch.layout import RankState

FAREWELL_SECONDS = 3.0
"""Seconds that other ranks of this host have to end by themselves."""
RECORDER_SECONDS = 2.0
"""Most seconds that a rank spends on torch's flight recorder."""


def write_report(folder: Path, text: str) -> Path | None:
    """Write a report under a new name; None if that cannot be done."""
    number = 1
    with suppress(OSError):
        folder.mkdir(parents=True, exist_ok=True)
        while (path := folder / f"watch.{number}.txt").exists():
            number += 1
        files.write_atomically(path, text)
        return path
    return None


def tell(run: Path, kind: str, problem: Problem, text: str, report: Path | None, step: int) -> None:
    """Print the report and the exit line, and note the event."""
    saved = "" if report is None else f"\nthis report: {report}"
    with suppress(OSError):
        os.write(
            2, f"\nllmtrain: {text.rstrip()}{saved}\nllmtrain: error: {problem}\n".encode(errors="replace")
        )
    note_event(run, kind, step, why=str(problem), report=None if report is None else str(report))


def write_flight_recorder(folder: Path, rank: int) -> None:
    """Write what torch's flight recorder has of this rank's collectives, where it has any: with NCCL always,
    with gloo if TORCH_FR_BUFFER_SIZE says so."""

    def write() -> None:
        with suppress(Exception):  # it is not documented, and the report stands without it
            from torch._C import _distributed_c10d as c10d

            content = c10d._dump_fr_trace_json()  # type: ignore[attr-defined]
            if json.loads(content)["entries"]:
                files.write_atomically(folder / f"flight-recorder.rank{rank}.json", content)

    thread = threading.Thread(target=write, daemon=True)
    thread.start()
    thread.join(RECORDER_SECONDS)


def leave(states: Sequence[RankState], folder: Path) -> NoReturn:
    """End this process, after the others of this host, of which some cannot end themselves, and remove their
    folder."""

    def lives(state: RankState) -> bool:
        return kernel.state_of(state.pid, state.started) != kernel.ENDED

    others = [state for state in states if state.pid != os.getpid()]
    # A launcher looks at the first exit code: let it be that of a rank that leaves by itself.
    leaving = [s for s in others if kernel.state_of(s.pid, s.started) != kernel.STOPPED]
    deadline = time.monotonic() + FAREWELL_SECONDS
    while time.monotonic() < deadline and any(map(lives, leaving)):
        time.sleep(0.1)
    for state in filter(lives, others):
        with suppress(OSError):
            os.kill(state.pid, signal.SIGKILL)
    shutil.rmtree(folder, ignore_errors=True)
    os._exit(WATCH_EXIT_CODE)
