"""The training loop: one for all models, engines and layouts."""

from __future__ import annotations

import os
import signal
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Protocol

from llmtrain.data.loader import Loader
from llmtrain.engine.base import Engine, NonFiniteError, StepResult
from llmtrain.engine.evaluation import Totals
from llmtrain.errors import Problem, TrainingError
from llmtrain.parallel import distributed, launcher

STOPPING = "\nllmtrain: stopping after this step; press Ctrl-C again to quit without saving\n"


class Observer(Protocol):
    """What is told of each step and evaluation: metrics, progress. It raises nothing."""

    @property
    def failed(self) -> bool:
        """Whether it can no longer record the run, which then ends as if asked to."""

    def on_step(
        self, step: int, result: StepResult, lr: float, seconds: float, data: Mapping[str, float]
    ) -> None:
        """`seconds` of the whole step; `data`: metrics of what it read."""

    def on_evaluation(self, step: int, totals: Totals, seconds: float) -> None: ...


@dataclass(frozen=True)
class Hooks:
    """What the loop calls besides the engine; `step` is the number of steps done."""

    lr: Callable[[int], float]
    """Number of the step, from 0 → learning rate."""
    evaluate: Callable[[], Totals] | None
    """One pass over held-out data; None when there is none."""
    save: Callable[[int, float | None], None]
    """Begin a checkpoint, given the steps done and the validation loss where it was measured at that step."""
    poll_save: Callable[[], None]
    """Called after each step: what has to be done for a checkpoint on its way."""
    finish_save: Callable[[], None]
    """Wait until the last checkpoint is whole."""


@dataclass(frozen=True)
class Outcome:
    """Where the loop ended: `step` steps are done; `interrupted` when it was told to stop earlier."""

    step: int
    validation_loss: float | None
    interrupted: bool


def train(
    engine: Engine,
    loader: Loader,
    hooks: Hooks,
    observer: Observer,
    *,
    start_step: int,
    steps: int,
    evaluate_every: int | None,
    evaluate_at_start: bool,
    save_every: int | None,
) -> Outcome:
    """Train from `start_step` to `steps`.

    SIGTERM or SIGINT on any rank ends it after the current step, with a checkpoint. Whatever was begun is
    whole when it returns. Raises TrainingError for a loss or gradient that is not finite; the last checkpoint
    stays.
    """
    validation_loss: float | None = None
    done = saved_step = start_step

    def evaluate(step: int) -> float | None:
        if hooks.evaluate is None:
            return None
        started = time.perf_counter()
        totals = hooks.evaluate()
        observer.on_evaluation(step, totals, time.perf_counter() - started)
        return totals.loss if totals.num_targets else None

    if evaluate_at_start and start_step == 0:
        validation_loss = evaluate(0)
    batches = loader.steps(start_step)
    with stop_signals() as stop_requested:
        for step in range(start_step, steps):
            started = time.perf_counter()
            batch = next(batches)
            lr = hooks.lr(step)
            try:
                stop = stop_requested() or observer.failed
                result = engine.train_step(batch.micro_batches, lr=lr, stop_requested=stop)
            except NonFiniteError as error:
                hooks.finish_save()
                stopped = TrainingError(_non_finite(step + 1, error, saved_step))
                raise distributed.everywhere(stopped) from error
            done = step + 1
            data = {"data_wait_seconds": batch.wait_seconds, **batch.progress}
            observer.on_step(done, result, lr, time.perf_counter() - started, data)
            hooks.poll_save()
            evaluated = is_due(done, evaluate_every, steps)
            if evaluated:
                validation_loss = evaluate(done)
            if result.stop or is_due(done, save_every, steps):
                hooks.save(done, validation_loss if evaluated else None)
                saved_step = done
            if result.stop:
                break
        hooks.finish_save()
    return Outcome(done, validation_loss, interrupted=done < steps)


def is_due(done: int, every: int | None, steps: int) -> bool:
    """Whether something that happens every so many steps, and at the end, happens after `done` steps."""
    return done == steps or (every is not None and done % every == 0)


@contextmanager
def stop_signals() -> Iterator[Callable[[], bool]]:
    """SIGTERM and SIGINT only ask to stop, and the first says so; a SIGINT after it interrupts as usual."""
    received: list[int] = []

    def on_signal(number: int, _frame: object) -> None:
        if number == signal.SIGINT and received:
            raise KeyboardInterrupt
        if not received and launcher.rank() == 0:
            # print() may not be called again while the step below is within one.
            os.write(2, STOPPING.encode())
        received.append(number)
        launcher.note_stop()

    before = {number: signal.signal(number, on_signal) for number in (signal.SIGTERM, signal.SIGINT)}
    try:
        yield lambda: bool(received)
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def _non_finite(step: int, error: NonFiniteError, saved_step: int) -> Problem:
    first, last = min(error.samples), max(error.samples)
    kept = f"the checkpoint of step {saved_step} is kept" if saved_step else "no checkpoint was due yet"
    return Problem(
        f"step {step}",
        f"{error.what} in {len(error.samples)} samples, numbers {first} to {last} in global order",
        "a finite number",
        f"{kept}; lower optimizer.lr, set optimizer.max_grad_norm or precision=fp32, then resume",
    )
