"""The training loop, the same for all models, engines and layouts."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial
from typing import NamedTuple, Protocol

from llmtrain.data.loader import Reading
from llmtrain.distributed import processes
from llmtrain.distributed.stop_checks import StopCheck, StoppedError
from llmtrain.engine.base import Engine, StepResult
from llmtrain.engine.evaluation import Totals
from llmtrain.engine.gate import Accepts, NonFiniteError
from llmtrain.errors import Problem, TrainingError
from llmtrain.watch import phases


class Observer(Protocol):
    """Records metrics and progress of each step and evaluation. It raises nothing."""

    @property
    def failed(self) -> bool:
        """Whether it can no longer record the run, which then stops as if it had been asked to."""

    def on_step(
        self, step: int, result: StepResult, lr: float, seconds: float, data: Mapping[str, float]
    ) -> None:
        """seconds: duration of the whole step; data: metrics of the data that it read."""

    def on_evaluation(self, step: int, totals: Totals, seconds: float) -> None: ...


class Verdict(NamedTuple):
    """What the run does after an evaluation."""

    saves: bool = False
    """A checkpoint is due: the evaluation is the best so far."""
    ends: bool = False
    """The run ends here, before its last step."""


@dataclass(frozen=True)
class Hooks:
    """Functions that the loop calls besides the engine's; `step` is the number of completed steps."""

    lr: Callable[[int], float]
    """Number of the step, counted from 0 → its learning rate."""
    evaluate: Callable[[int, Callable[[], None]], Totals] | None
    """Make one pass over held-out data, given the completed steps and a function to call between batches;
    None without such data."""
    save: Callable[[int, float | None, bool], None]
    """Begin a checkpoint, given the completed steps, the validation loss if it was measured at that step, and
    whether an evaluation was due there and is still owed."""
    evaluated_late: Callable[[float | None], None]
    """Record the evaluation that the resumed checkpoint still owed."""
    after_step: Callable[[], None]
    """Advance a checkpoint that is being written, and free memory."""
    finish_save: Callable[[], None]
    """Wait until the last checkpoint is complete."""
    judge: Callable[[int, Totals], Verdict] = lambda step, totals: Verdict()
    """Record an evaluation, and return what follows from it, the same on all ranks."""
    accepts: Accepts | None = None
    """Return whether a step may be taken, given its loss and gradient norm; None: every finite one."""
    copy: Callable[[int, float | None], None] = lambda step, loss: None
    """Begin a copy of the state in memory, if one is due, given the completed steps and the validation loss
    if it was measured at that step."""
    rejected: Callable[[int], bool] = lambda step: False
    """Record, given the completed steps, that the last was not taken; return whether the run has gone
    back. It raises TrainingError to end the run."""


@dataclass(frozen=True)
class Schedule:
    """The schedule of evaluations and saves; steps are counted over the whole run."""

    start_step: int
    steps: int
    evaluate_every: int | None
    evaluate_at_start: bool
    save_every: int | None
    evaluation_owed: bool = False
    """The run was stopped when an evaluation was due; make that evaluation first."""
    pause_at: int | None = None
    """Steps after which the loop saves and returns, to go on with another engine; None: `steps`."""


@dataclass(frozen=True)
class Outcome:
    """The end of the loop after `step` steps; `interrupted` if it was asked to stop before those it was to
    take."""

    step: int
    validation_loss: float | None
    interrupted: bool
    ended_early: bool = False
    """An evaluation ended it before the last step."""
    went_back: bool = False
    """The run goes on from its newest checkpoint, with another engine and other samples."""


def train(
    engine: Engine,
    loader: Reading,
    hooks: Hooks,
    observer: Observer,
    schedule: Schedule,
    asked_to_stop: Callable[[], bool] = lambda: False,
) -> Outcome:
    """Train from `start_step` to `steps`, or to `pause_at`.

    When any rank is asked to stop, the loop ends after the current step; so it does after an evaluation that
    ends the run. A step or an evaluation that takes long is abandoned as if it had not begun. A checkpoint is
    saved first, and everything begun is complete on return. Raise TrainingError for a loss or gradient that
    is not finite, unless `hooks.accepts` decides about it; the last checkpoint stays.
    """
    start_step, steps = schedule.start_step, schedule.steps
    until = steps if schedule.pause_at is None else schedule.pause_at
    validation_loss: float | None = None
    verdict = Verdict()
    done = saved_step = start_step

    def stop_requested() -> bool:
        return asked_to_stop() or observer.failed

    stop_check = StopCheck(stop_requested, engine.device)

    def evaluate(step: int) -> float | None:
        nonlocal verdict
        if hooks.evaluate is None:
            return None
        started = time.perf_counter()
        with phases.EVALUATION:
            totals = hooks.evaluate(step, StopCheck(stop_requested, engine.device).check)
        observer.on_evaluation(step, totals, time.perf_counter() - started)
        with phases.EVALUATION:
            verdict = hooks.judge(step, totals)
        return totals.loss if totals.num_targets else None

    def save(evaluated: bool, owed: bool) -> None:
        nonlocal saved_step
        with phases.SAVE:
            hooks.save(done, validation_loss if evaluated else None, owed and hooks.evaluate is not None)
        saved_step = done

    try:
        if schedule.evaluation_owed:
            validation_loss = evaluate(start_step)
            hooks.evaluated_late(validation_loss)
        elif schedule.evaluate_at_start and start_step == 0:
            validation_loss = evaluate(0)
    except StoppedError:
        return Outcome(start_step, None, interrupted=True)
    if verdict.ends:
        return Outcome(start_step, validation_loss, interrupted=False, ended_early=True)
    stopped = went_back = False
    train_step = engine.train_step
    if hooks.accepts is not None:
        train_step = partial(train_step, accepts=hooks.accepts)
    batches = loader.steps(start_step)
    for step in range(start_step, until):
        started = time.perf_counter()
        phases.begin_step(step + 1)
        with phases.DATA:
            batch = next(batches)
        lr = hooks.lr(step)
        stop_check.begin()
        try:
            result = train_step(
                batch.micro_batches, lr=lr, stop_requested=stop_requested, between=stop_check.check
            )
        except StoppedError:
            stopped = True
            if saved_step < done:
                save(evaluated=False, owed=False)
            break
        except NonFiniteError as error:
            hooks.finish_save()
            failure = TrainingError(_non_finite(step + 1, error, saved_step))
            raise processes.everywhere(failure) from error
        done, stopped = step + 1, result.stop
        data = {"data_wait_seconds": batch.wait_seconds, **batch.progress}
        observer.on_step(done, result, lr, time.perf_counter() - started, data)
        hooks.after_step()
        if result.rejected and (went_back := hooks.rejected(done)):
            break
        evaluation_is_due, verdict = is_due(done, schedule.evaluate_every, steps), Verdict()
        if evaluation_is_due and not stopped:
            try:
                validation_loss = evaluate(done)
            except StoppedError:
                stopped = True
        if (
            stopped
            or done == until
            or verdict.saves
            or verdict.ends
            or is_due(done, schedule.save_every, steps)
        ):
            save(evaluated=evaluation_is_due and not stopped, owed=evaluation_is_due and stopped)
        if stopped or verdict.ends:
            break
        if done < until:
            hooks.copy(done, validation_loss if evaluation_is_due else None)
    phases.end_steps()
    with phases.SAVE:
        hooks.finish_save()
    if went_back:
        return Outcome(done, None, interrupted=False, went_back=True)
    return Outcome(done, validation_loss, interrupted=stopped, ended_early=verdict.ends and done < steps)


def is_due(done: int, every: int | None, steps: int) -> bool:
    """Return whether what happens every `every` steps, and at the end, happens after `done` steps."""
    return done == steps or (every is not None and done % every == 0)


def _non_finite(step: int, error: NonFiniteError, saved_step: int) -> Problem:
    first, last = min(error.samples), max(error.samples)
    kept = f"the checkpoint of step {saved_step} is kept" if saved_step else "no checkpoint was due yet"
    advice = f"{kept}; lower optimizer.lr, set optimizer.max_grad_norm or precision=fp32, then resume"
    if step == 1:  # no learning rate has changed anything yet
        advice = "look at the weights that the run began with and at these samples, or set precision=fp32"
    return Problem(
        f"step {step}",
        f"{error.what} in {len(error.samples)} samples, numbers {first} to {last} in global order",
        "a finite number",
        advice,
    )
