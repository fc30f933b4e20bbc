"""What a rank is doing, as the loop and the engines say it.

    with phases.FORWARD:
        …

A phase may be inside another. Without a watch it costs a fraction of a microsecond.
"""

from __future__ import annotations

from llmtrain.watch import recorder
from llmtrain.watch.layout import PHASES


class Phase:
    """A phase as a context; one object serves all its uses."""

    def __init__(self, name: str) -> None:
        self._number = PHASES.index(name)

    def __enter__(self) -> None:
        if recorder.current is not None:
            recorder.current.enter(self._number)

    def __exit__(self, *_: object) -> None:
        if recorder.current is not None:
            recorder.current.leave()


DATA = Phase("data")
FORWARD = Phase("forward")
BACKWARD = Phase("backward")
OPTIMIZER = Phase("optimizer")
EVALUATION = Phase("evaluation")
SAVE = Phase("save")


def begin_step(step: int) -> None:
    """Say that the step with this number, counted from 1, begins."""
    if recorder.current is not None:
        recorder.current.begin_step(step)


def end_steps() -> None:
    """Say that the steps are over: what follows may take as long as a save."""
    if recorder.current is not None:
        recorder.current.end_steps()


def go_on() -> None:
    """Report progress of long work that has neither steps nor collectives."""
    if recorder.current is not None:
        recorder.current.go_on()


def begin_micro_batch(number: int) -> None:
    """Say that the micro-batch with this number, counted from 0, begins."""
    if recorder.current is not None:
        recorder.current.begin_micro_batch(number)
