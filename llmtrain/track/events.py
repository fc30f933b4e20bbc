"""What happened to a run besides its steps: starts, checkpoints, bad steps, restarts, and how each start
ended."""

from __future__ import annotations

import json
import os
import time
from collections.abc import Iterable, Mapping
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from llmtrain import files
from llmtrain.reading import parse_object

EVENTS = "events.jsonl"
KINDS = (
    *("start", "save", "upload", "skip", "rollback", "stop", "done", "fail", "restart"),
    *("hang", "divergence", "straggler"),
)
ENDS = ("start", "stop", "done", "fail")
"""Kinds of which the last one says in what state a run is."""
MOST_BYTES = 64 << 20
"""Bytes at the end of a file of events that are read."""


@dataclass(frozen=True)
class Event:
    """One thing that happened."""

    kind: str
    """One of KINDS."""
    at: float
    """Seconds since 1970."""
    step: int | None = None
    facts: Mapping[str, Any] = field(default_factory=dict)


def note_event(folder: Path, kind: str, step: int | None = None, **facts: Any) -> None:
    """Append an event to the file of a run folder. A full disk is passed over: the run needs none."""
    said = {"event": kind, "at": round(time.time(), 3), **({} if step is None else {"step": step}), **facts}
    with suppress(OSError):
        file = os.open(folder / EVENTS, os.O_WRONLY | os.O_APPEND | os.O_CREAT | os.O_NOFOLLOW, 0o644)
        try:
            os.write(file, (json.dumps(said) + "\n").encode())
        finally:
            os.close(file)


def read_events(path: Path) -> list[Event]:
    """Return the events in their order, without damaged lines; none if the file is missing."""
    try:
        with open(path, "rb", opener=files.open_regular) as file:
            size = os.fstat(file.fileno()).st_size
            file.seek(max(0, size - MOST_BYTES))
            lines = file.read(MOST_BYTES).splitlines()
    except OSError:
        return []
    found = []
    for line in lines:
        with suppress(ValueError):
            record = parse_object(line)
            kind, at, step = record.pop("event", None), record.pop("at", None), record.pop("step", None)
            if kind in KINDS and type(at) in (int, float):
                found.append(Event(kind, float(at), step if type(step) is int else None, record))
    return found


def skipped_steps(events: Iterable[Event]) -> dict[int, str]:
    """Return step → why it was not taken, of the steps that the run still stands on: a start or a rollback
    undoes what came after its step."""
    found: dict[int, str] = {}
    for event in events:
        if event.step is None:
            continue
        if event.kind in ("start", "rollback"):
            found = {step: why for step, why in found.items() if step <= event.step}
        elif event.kind == "skip":
            found[event.step] = str(event.facts.get("why", ""))
    return found
