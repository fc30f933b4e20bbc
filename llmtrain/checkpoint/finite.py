"""Find weights that are NaN or infinite, as in a damaged copy or a diverged run."""

from __future__ import annotations

from torch import Tensor

from llmtrain.errors import CheckpointError, Problem
from llmtrain.parallel.materialize import Source
from llmtrain.tensor_boxes import Shard

SHOWN = 4


class FiniteCheck:
    """Checks weights while they are read, so that none is read twice."""

    def __init__(self) -> None:
        self._bad: dict[str, int] = {}

    def look(self, name: str, values: Tensor) -> None:
        """Check a weight or a part of it; engines may read some parts twice."""
        bad = values.numel() - int(values.isfinite().sum())
        if bad:
            self._bad[name] = max(bad, self._bad.get(name, 0))

    def watching(self, source: Source) -> Source:
        """Return `source` with every value that it gives looked at."""

        def watched(out: Tensor, name: str, shard: Shard, start: int) -> None:
            source(out, name, shard, start)
            self.look(name, out)

        return watched

    def refuse(self, where: str) -> None:
        """Raise CheckpointError with names and counts if any weight was not finite. where: their source."""
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
