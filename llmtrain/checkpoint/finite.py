"""Weights that are not finite, as a broken copy or a diverged run has them: no loss of theirs is finite."""

from __future__ import annotations

from torch import Tensor

from llmtrain.errors import CheckpointError, Problem

SHOWN = 4


class FiniteCheck:
    """Looks at weights as they are read, so that none is read twice."""

    def __init__(self) -> None:
        self._bad: dict[str, int] = {}

    def look(self, name: str, values: Tensor) -> None:
        """values: of the weight, or of a part of it; engines may read some of them twice."""
        bad = values.numel() - int(values.isfinite().sum())
        if bad:
            self._bad[name] = max(bad, self._bad.get(name, 0))

    def refuse(self, where: str) -> None:
        """Raise CheckpointError, with names and counts, where some were not finite. where: they come from."""
        if not self._bad:
            return
        named = [f"{count:,} in {name}" for name, count in self._bad.items()]
        more = f" and {len(named) - SHOWN} weights more" if len(named) > SHOWN else ""
        raise CheckpointError(
            Problem(
                where,
                f"numbers that are NaN or infinite: {', '.join(named[:SHOWN])}{more}",
                "weights that are finite",
                "copy it again, or take another model or an earlier checkpoint",
            )
        )
