"""What every tracker is."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Protocol

Metrics = Mapping[str, float]


class Tracker(Protocol):
    """Takes the metrics of one run."""

    def log(self, step: int, metrics: Metrics) -> None:
        """Take what was measured at `step`; steps never fall, one step may come in several parts."""

    def state(self) -> dict[str, Any]:
        """What a checkpoint keeps so that a resumed run goes on with the same track; plain JSON values."""

    def close(self, failed: bool) -> None:
        """Write what waits in memory; `failed` marks the run as failed where the tracker knows such."""
