"""Which events of a run people are told of at once."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from llmtrain.track.events import Event

_TITLES = {"skip": "bad step", "rollback": "went back", "hang": "hangs", "fail": "failed"}
"""Kind of an event → what is said of the run."""
_USUAL = ("save", "upload")


def alert_of(run: str, kind: str, step: int | None, facts: Mapping[str, Any]) -> tuple[str, str] | None:
    """Return title and text of the alert for an event of the run `run`; None if no one needs to know."""
    if kind not in _TITLES:
        return None
    return f"{run} {_TITLES[kind]}", _told(step, facts)


def alert_of_restart(run: str, step: int, before: Sequence[Event]) -> tuple[str, str]:
    """Return title and text of the alert for a start that goes on from `step`. before: the events until then,
    of which the last may say why it ended: a run that hangs or is killed can tell no one."""
    last = next((event for event in reversed(before) if event.kind not in _USUAL), None)
    why = "" if last is None else f", after {last.kind}"
    told = "" if last is None or last.kind == "start" else _told(last.step, last.facts)
    return f"{run} restarted", f"from step {step:,}{why}{f' ({told})' if told else ''}"


def _told(step: int | None, facts: Mapping[str, Any]) -> str:
    where = "" if step is None else f"step {step:,}"
    said = "; ".join(str(value) if name == "why" else f"{name} {value}" for name, value in facts.items())
    return ": ".join(part for part in (where, said) if part)
