"""The order of things in the loop, and what is left of it where it is asked to stop."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch

from llmtrain.distributed import processes, stop_checks
from llmtrain.engine.base import StepResult
from llmtrain.engine.evaluation import Totals
from llmtrain.engine.gate import NonFiniteError
from llmtrain.errors import TrainingError
from llmtrain.train.loop import Hooks, Outcome, Schedule, train
from tests.support import ranks


class Training:
    """A loop over nothing, which writes down what it does; `stop_at` says when it is asked to stop."""

    device = torch.device("cpu")
    failed = False

    def __init__(self, stop_at: str = "") -> None:
        self.done: list[str] = []
        self._stop_at = stop_at
        self._asked = False

    def _note(self, what: str) -> None:
        self.done.append(what)
        self._asked = self._asked or what == self._stop_at

    def train_step(
        self,
        micro_batches: Any,
        *,
        lr: float,
        stop_requested: Callable[[], bool],
        between: Callable[[], None],
    ) -> StepResult:
        self._note(f"step {lr:g}")
        between()
        self._note(f"half of step {lr:g}")
        between()
        return StepResult(1.0, 1, 1.0, stop=stop_requested())

    def steps(self, start: int) -> Any:
        while True:
            yield type("Batch", (), {"micro_batches": [], "wait_seconds": 0.0, "progress": {}})

    def on_step(self, step: int, *_: object) -> None:
        self._note(f"step {step} done")

    def on_evaluation(self, step: int, *_: object) -> None:
        self.done.append(f"evaluated {step}")

    def evaluate(self, step: int, between: Callable[[], None]) -> Totals:
        for batch in range(3):
            between()
            self._note(f"batch {batch}")
        return Totals(2.0, 1)

    def save(self, step: int, loss: float | None, owed: bool) -> None:
        self.done.append(f"saved {step}, loss {loss}{', evaluation owed' if owed else ''}")

    def run(self, start_step: int = 0, owed: bool = False) -> Outcome:
        nothing = lambda *_: None  # noqa: E731
        late = lambda loss: self.done.append(f"late {loss}")  # noqa: E731
        hooks = Hooks(lambda step: step + 1, self.evaluate, self.save, late, nothing, nothing)
        schedule = Schedule(start_step, 4, 2, False, 2, owed)
        engine: Any = self
        return train(engine, engine, hooks, engine, schedule, lambda: self._asked)


def test_undisturbed():
    training = Training()
    assert training.run() == Outcome(4, 2.0, interrupted=False)
    done = [what for what in training.done if "batch" not in what and not what.startswith(("step", "half"))]
    assert done == ["evaluated 2", "saved 2, loss 2.0", "evaluated 4", "saved 4, loss 2.0"]


@pytest.mark.parametrize(
    ("stop_at", "last", "step"),
    [
        ("step 1", ["step 1"], 0),  # nothing is done yet
        ("step 2", ["step 2", "saved 1, loss None"], 1),
        ("half of step 1", ["step 1", "half of step 1"], 0),
        ("step 1 done", ["step 1 done", "step 2", "saved 1, loss None"], 1),
        ("step 2 done", ["step 2 done", "saved 2, loss None, evaluation owed"], 2),
        ("batch 1", ["batch 0", "batch 1", "saved 2, loss None, evaluation owed"], 2),
        ("step 3", ["saved 2, loss 2.0", "step 3"], 2),
    ],
)
def test_asked_to_stop(stop_at: str, last: list[str], step: int):
    training = Training(stop_at)
    assert training.run() == Outcome(step, 2.0 if stop_at == "step 3" else None, interrupted=True)
    assert training.done[-len(last) :] == last


def test_an_evaluation_that_is_owed_comes_first():
    training = Training()
    assert training.run(start_step=2, owed=True) == Outcome(4, 2.0, interrupted=False)
    assert training.done[:5] == ["batch 0", "batch 1", "batch 2", "evaluated 2", "late 2.0"]
    again = Training("batch 0")
    assert again.run(start_step=4, owed=True) == Outcome(4, None, interrupted=True)
    assert again.done == ["batch 0"], "the checkpoint goes on owing it"


def look(asked_after: int) -> int:
    """After how many parts this rank stops, of which the second rank is asked to at `asked_after`."""
    parts = 0
    watch = stop_checks.StopCheck(lambda: processes.rank() == 1 and parts >= asked_after, torch.device("cpu"))
    try:
        while parts < 10_000:
            parts += 1
            watch.check()
    except stop_checks.StoppedError:
        return parts
    return -1


@pytest.mark.slow
def test_ranks_stop_at_the_same_part():
    first, second = ranks.run(2, look, 7)
    assert first == second >= 7


@pytest.mark.parametrize(
    ("start_step", "advice"), [(0, "weights that the run began with"), (1, "lower optimizer.lr")]
)
def test_the_first_step_blames_no_learning_rate(start_step: int, advice: str):
    training = Training()

    def train_step(*_: object, **__: object) -> StepResult:
        raise NonFiniteError("loss nan", (3, 4))

    training.train_step = train_step  # type: ignore[method-assign]
    with pytest.raises(
        TrainingError, match=rf"step {start_step + 1}: got loss nan in 2 samples.*{advice}"
    ) as caught:
        training.run(start_step)
    assert ("optimizer.lr" in str(caught.value)) == (start_step > 0)
