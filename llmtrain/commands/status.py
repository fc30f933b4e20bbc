"""`llmtrain status RUN`: where a run is. It reads the run folder alone, on any host, and changes nothing."""

from __future__ import annotations

import datetime
import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from llmtrain.config import decode
from llmtrain.errors import printable
from llmtrain.files import expand_home
from llmtrain.report.record import RunRecord, read_run
from llmtrain.track.progress import duration

_GIB = 2**30
LAST_BYTES = 8 << 20
"""End of the metrics that is read: some ten thousand steps, in a fraction of a second."""


@dataclass(frozen=True)
class StatusConfig:
    run: Path
    """A run folder."""
    format: Literal["text", "json"] = "text"
    """text: one line a fact; json: one object."""


def run(mapping: Mapping[str, Any]) -> None:
    """Print where a run is. Raise CheckpointError for a folder in which no run started."""
    config = decode(StatusConfig, mapping)
    record = read_run(expand_home(config.run), LAST_BYTES)
    if config.format == "json":
        print(json.dumps(facts_of(record)), flush=True)
        return
    for name, value in lines_of(record):
        print(f"{name:<15} {value}", flush=True)


def facts_of(record: RunRecord) -> dict[str, Any]:
    """Return what is known, null for what is not: times in seconds, memory in bytes."""
    saved = record.saved[-1] if record.saved else None
    return {
        "run": str(record.path),
        "name": record.name,
        "state": record.state,
        "step": record.step,
        "steps": record.steps,
        "loss": record.last("loss"),
        "validation_loss": record.last("validation_loss"),
        "tokens_per_second": record.last("tokens_per_second"),
        "memory_bytes": record.last("memory_bytes"),
        "seconds_per_step": record.seconds_per_step,
        "seconds_left": record.seconds_left,
        "seconds_since_step": record.silent_for,
        "checkpoint": None if saved is None else str(saved.path),
        "checkpoint_step": None if saved is None else saved.step,
        "seconds_since_checkpoint": None if saved is None else saved.seconds_ago,
        "starts": sum(event.kind == "start" for event in record.events),
        "restarts": sum(event.kind == "restart" for event in record.events),
        "process": record.holder,
    }


def lines_of(record: RunRecord) -> list[tuple[str, str]]:
    """Return (name, value) of what is known."""
    facts = facts_of(record)
    share = f" ({record.step / record.steps:.1%})" if record.steps else ""
    lines = [
        ("run", facts["run"]),
        ("state", facts["state"]),
        ("step", f"{record.step:,} of {record.steps or 0:,}{share}"),
    ]
    lines += [
        (name.replace("_", " "), f"{facts[name]:.4f}")
        for name in ("loss", "validation_loss")
        if facts[name] is not None
    ]
    if facts["tokens_per_second"] is not None:
        lines.append(("tokens/s", f"{facts['tokens_per_second']:,.0f}"))
    if facts["memory_bytes"] is not None:
        lines.append(("memory", f"{facts['memory_bytes'] / _GIB:.2f} GiB"))
    if facts["seconds_left"] is not None:
        end = datetime.datetime.now() + datetime.timedelta(seconds=facts["seconds_left"])
        lines.append(("left", f"{duration(facts['seconds_left'])}, until {end:%Y-%m-%d %H:%M}"))
    if record.silent_for is not None:
        lines.append(("last step", f"{duration(record.silent_for)} ago"))
    if record.saved:
        saved = record.saved[-1]
        lines.append(("checkpoint", f"step {saved.step:,}, {duration(saved.seconds_ago)} ago, {saved.path}"))
    lines.append(("starts", str(facts["starts"])))
    if restarts := [event for event in record.events if event.kind == "restart"]:
        lines.append(
            ("restarts", f"{len(restarts)}; the last: {printable(str(restarts[-1].facts.get('why')))}")
        )
    if record.holder is not None:
        lines.append(("process", record.holder.removeprefix("process ")))
    return lines
