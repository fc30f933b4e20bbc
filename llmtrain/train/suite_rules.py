"""Decide whether a run can do tasks of the lm-evaluation-harness at its evaluations. Free of torch."""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING

from llmtrain.errors import Problem
from llmtrain.harness.names import task_problems
from llmtrain.models.registry import family_of
from llmtrain.parallel.nearest import nearest_multiples
from llmtrain.train.whole_model import divisions

if TYPE_CHECKING:
    from llmtrain.train.config import TrainConfig


def suite_problems(config: TrainConfig) -> Iterator[Problem]:
    """Yield a problem for each setting with which the tasks of `harness.tasks` cannot be done."""
    harness = config.harness
    if not harness.tasks:
        return
    yield from (problem.within("harness") for problem in task_problems(harness.tasks, harness.tasks_path))
    yield from _hindrances(config)
    every, evaluated = harness.every, config.evaluation.every
    if evaluated is None:
        got, remedy = "tasks with evaluation.every=null", "give evaluation.every=…"
        yield Problem("harness.tasks", got, "none without evaluations", remedy)
    elif every is not None and every % evaluated:
        nearest = " or ".join(map(str, nearest_multiples(every, evaluated)))
        allowed = f"a multiple of evaluation.every={evaluated}, such as {nearest}"
        yield Problem("harness.every", str(every), allowed)


def _hindrances(config: TrainConfig) -> Iterator[Problem]:
    parallel = config.parallel
    is_decoder = family_of(config.model).continues_texts and config.objective.data == "tokens"
    found = {
        f"model.family={config.model.family} and objective={config.objective.kind}": not is_decoder,
        **divisions(parallel),
        "parallel.tensor_sequence=true": parallel.tensor_sequence,
    }
    for what, hinders in found.items():
        if hinders:
            allowed = (
                "none: tasks are done by a decoder that each process, or a group of tensor parallelism, "
            )
            allowed += "holds whole"
            remedy = "evaluate its checkpoints: llmtrain evaluate suite=lm_eval" if is_decoder else ""
            yield Problem("harness.tasks", f"tasks with {what}", allowed, remedy)
