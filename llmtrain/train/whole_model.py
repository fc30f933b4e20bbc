"""Name the layouts under which neither a process nor a group of tensor parallelism holds the whole model.
Free of torch."""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from llmtrain.parallel.config import ParallelConfig


def divisions(parallel: ParallelConfig) -> dict[str, bool]:
    """Return, for each `key=value` that divides the model or its sequences further, whether it is so here."""
    return {
        f"parallel.zero={parallel.zero}": parallel.zero == 3,
        f"parallel.pipeline={parallel.pipeline}": parallel.pipeline > 1,
        f"parallel.sequence={parallel.sequence}": parallel.sequence > 1,
    }
