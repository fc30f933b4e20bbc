"""Run loaded tasks on a model, on all processes that hold it, without side effects on the process."""

from __future__ import annotations

import traceback
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from llmtrain.distributed import processes
from llmtrain.distributed.stop_checks import StoppedError
from llmtrain.errors import DataError, Problem, UserError
from llmtrain.harness.tasks import said
from llmtrain.harness.team import Team
from llmtrain.harness.undisturbed import SEED, undisturbed

if TYPE_CHECKING:
    from llmtrain.harness.model import HarnessModel

RESAMPLES = 100_000
"""Of documents, for the standard error of figures without a formula; the harness's default."""


def run_tasks(
    team: Team,
    make_model: Callable[[], HarnessModel],
    tasks: Mapping[str, Any] | None,
    *,
    limit: int | None,
    resamples: int = RESAMPLES,
    chat: bool = False,
) -> Any:
    """Return the harness's results on rank 0, None on the others. All processes of the team call it.

    make_model: called on rank 0. tasks: of `load_tasks`; None on other ranks. limit: documents of each task.
    resamples: 0: without standard errors. chat: render requests by the model's chat template.
    Raise UserError on all processes for one that any of them meets, and for a task that fails.
    """
    problem: UserError | None = None
    results = None
    if processes.is_main():
        try:
            with undisturbed():
                results = _evaluate(make_model(), tasks, limit, resamples, chat)
        except UserError as error:
            if error.everywhere:  # the others have met it too
                raise
            problem = error
        team.dismiss()
    else:
        team.follow()
    problem = processes.from_main(problem)
    if problem is not None:
        raise processes.everywhere(problem)
    return results


def _evaluate(lm: HarnessModel, tasks: Any, limit: int | None, resamples: int, chat: bool) -> Any:
    from lm_eval.evaluator import evaluate

    try:
        for task in tasks["tasks"].values():
            task.set_fewshot_seed(seed=SEED)
        return evaluate(
            lm=lm,
            task_dict=tasks,
            limit=limit,
            bootstrap_iters=resamples,
            log_samples=False,
            apply_chat_template=chat,
            fewshot_as_multiturn=chat,
        )
    except (UserError, StoppedError):
        raise
    except Exception as error:  # whatever a template or a function of a task may raise
        if _is_ours(error):
            raise
        raise DataError(Problem("tasks", f"a task that fails ({said(error)})", "", "correct it")) from error


def _is_ours(error: BaseException) -> bool:
    """Return whether the error was raised below the model, not by a task."""
    room = Path(__file__).parent
    frames = traceback.extract_tb(error.__traceback__)[1:]  # without _evaluate
    return any(Path(frame.filename).is_relative_to(room) for frame in frames)
