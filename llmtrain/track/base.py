"""The interface of all trackers."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple, Protocol

Metrics = Mapping[str, float]


class WrittenText(NamedTuple):
    """What a model wrote."""

    beginning: str
    """What it was given."""
    continuation: str


class Tracker(Protocol):
    """Records the metrics of one run."""

    def log(self, step: int, metrics: Metrics) -> None:
        """Record metrics of `step`. Steps never decrease; one step may be logged in several calls."""

    def show(self, step: int, pictures: Mapping[str, bytes]) -> None:
        """Record pictures of `step`: name → PNG. Their names are those of no metric."""

    def write(self, step: int, texts: Sequence[WrittenText]) -> None:
        """Record samples of what the model writes after `step`."""

    def state(self) -> dict[str, Any]:
        """Return the state that a checkpoint stores, so that a resumed run continues this record: JSON
        values."""

    def alert(self, title: str, text: str) -> None:
        """Tell people of something, if the tracker can."""

    def keep(self, step: int, checkpoint: Path) -> None:
        """Keep a checkpoint, if the tracker is to."""

    def close(self, failed: bool) -> None:
        """Write buffered metrics. failed: mark the run as failed, if the tracker supports that."""
