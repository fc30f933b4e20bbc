"""Decide whether a run can write samples of text at its evaluations. Free of torch."""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING

from llmtrain.errors import Problem
from llmtrain.train.whole_model import divisions

if TYPE_CHECKING:
    from llmtrain.train.config import TrainConfig


def text_sample_problems(config: TrainConfig) -> Iterator[Problem]:
    """Yield a problem for each setting with which the samples of `evaluation.texts` cannot be written."""
    texts, objective, parallel = config.evaluation.texts, config.objective, config.parallel
    if not texts:
        return
    if config.evaluation.every is None:
        got, remedy = f"{texts} with evaluation.every=null", "give evaluation.every=…"
        yield Problem("evaluation.texts", got, "0 without evaluations", remedy)
    writes_targets = objective.paired == "needed" and config.data.is_table
    if not (objective.continues or objective.writes_answers or writes_targets):
        got = f"{texts} with objective={objective.kind}" + (
            f" and data.kind={config.data.kind}" if objective.paired == "needed" else ""
        )
        allowed = "0, or a model that continues texts, answers, or writes the targets of a table"
        yield Problem("evaluation.texts", got, allowed)
    found = {**divisions(parallel), "parallel.tensor_sequence=true": parallel.tensor_sequence}
    for what, hinders in found.items():
        if hinders:
            allowed = "0: texts are written by a model that each process, or a group of tensor parallelism, "
            yield Problem("evaluation.texts", f"{texts} with {what}", allowed + "holds whole")
