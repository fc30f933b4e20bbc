"""Which events of a run people are told of at once."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

_TITLES = {
    "start": "restarted",
    "skip": "bad step",
    "rollback": "went back",
    "hang": "hangs",
    "fail": "failed",
}
"""Kind of an event → what is said of the run."""


def alert_of(run: str, kind: str, step: int | None, facts: Mapping[str, Any]) -> tuple[str, str] | None:
    """Return title and text of the alert for an event of the run `run`; None if no one needs to know."""
    if kind not in _TITLES or (kind == "start" and not step):
        return None
    where = "" if step is None else f"step {step:,}"
    told = "; ".join(f"{name} {value}" if name != "why" else str(value) for name, value in facts.items())
    return f"{run} {_TITLES[kind]}", ": ".join(part for part in (where, told) if part)
