"""Decide for how many validation rows to write texts during training. Free of torch."""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING

from llmtrain.errors import Problem
from llmtrain.scoring.texts import missing_packages
from llmtrain.train.whole_model import divisions

if TYPE_CHECKING:
    from llmtrain.train.config import TrainConfig

USUAL_ROWS = 32
"""Rows with `evaluation.written=null`."""


def rows_to_write(config: TrainConfig) -> int:
    """Return the rows of the validation split for which each evaluation writes texts."""
    if config.evaluation.written is not None:
        return config.evaluation.written
    is_possible = not list(_hindrances(config)) and not missing_packages()
    return USUAL_ROWS if is_possible and config.evaluation.every is not None else 0


def writing_problems(config: TrainConfig) -> Iterator[Problem]:
    """Yield what hinders the texts that `evaluation.written` asks for."""
    if config.evaluation.written:
        yield from _hindrances(config)
        if missing := missing_packages():
            got = f"{config.evaluation.written} without the package {' or '.join(missing)}"
            remedy = 'pip install "llmtrain[seq2seq]"'
            yield Problem("evaluation.written", got, "0, or null", remedy)


def _hindrances(config: TrainConfig) -> Iterator[Problem]:
    parallel = config.parallel
    found = {
        f"objective={config.objective.kind}": config.objective.paired != "needed",
        f"data.kind={config.data.kind}": not config.data.is_table,
        **divisions(parallel),
    }
    for what, hinders in found.items():
        if hinders:
            allowed = "null, or 0: texts are written by a model that each process, or a group of tensor "
            allowed += "parallelism, holds whole, for sources of a table"
            yield Problem("evaluation.written", f"{config.evaluation.written} with {what}", allowed)
