"""A whole start of a run with an engine that computes next to nothing and writes down what it is asked."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch

from llmtrain.checkpoint.reader import Checkpoint
from llmtrain.data.loader import MicroBatch
from llmtrain.data.stream import combine_digests
from llmtrain.distributed import stopping
from llmtrain.engine.base import StepResult
from llmtrain.engine.evaluation import Totals
from llmtrain.objectives.base import Objective
from llmtrain.train import starting
from llmtrain.train.resolve import resolve
from llmtrain.train.session import Session
from tests.support.owners import MATRIX, Owner
from tests.support.training import TINY_GPT, compose

NUM_EVALUATED = 8
"""Samples of an evaluation: four batches."""
SETTINGS = (
    *TINY_GPT,
    "engine=local",
    "device=cpu",
    "data.workers=0",
    "train.steps=6",
    "checkpoint.every=2",
    "checkpoint.keep_last=9",
    "evaluation.every=3",
    f"evaluation.max_samples={NUM_EVALUATED}",
    "evaluation.at_start=false",
)


class FakeEngine(Owner):
    """One parameter, stepped by AdamW. A step's loss follows from the parameter and from the data, so that it
    tells whether a resumed run has the state and the samples of one that was never stopped."""

    def __init__(self, objective: Objective, calls: list[str], on_call: Callable[[str], None]) -> None:
        super().__init__(MATRIX)
        self.objective = objective
        self._calls, self._on_call = calls, on_call

    def _mean(self) -> float:
        (fragment,) = self.fragments()
        return float(fragment.view_of(fragment.holder).mean())

    def _note(self, call: str) -> None:
        self._calls.append(call)
        self._on_call(call)

    def train_step(
        self,
        micro_batches: Sequence[MicroBatch],
        *,
        lr: float,
        stop_requested: Callable[[], bool],
        between: Callable[[], None],
    ) -> StepResult:
        first, last = micro_batches[0].samples.start, micro_batches[-1].samples.stop
        self._note(f"train {first}:{last}")
        for _ in micro_batches[1:]:
            between()
        digest = combine_digests(sum(micro.digest for micro in micro_batches))
        loss = self._mean() + digest % 1000 / 1000
        self.step()
        return StepResult(loss, 8 * 32, 1.0, stop=stop_requested(), data_digest=digest)

    def evaluate(self, micro_batches: Iterable[MicroBatch]) -> Totals:
        count = 0
        for count, _ in enumerate(micro_batches, 1):
            self._note(f"evaluate batch {count}")
        return Totals(self._mean() * count, count)


class FakeRun:
    """A run in a folder, started as often as asked; each start in this process, without a process group."""

    def __init__(self, corpus: Path, folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        self.folder = folder
        self.calls: list[str] = []
        """What the engines of all starts were asked."""
        self._corpus, self._monkeypatch = corpus, monkeypatch

    def start(self, *overrides: str, on_call: Callable[[str], None] = lambda call: None) -> bool:
        """Train until the end or a request to stop; return whether all steps are done.

        on_call: called with what the engine is asked, before it does so.
        """

        def build(
            _config: Any,
            _layout: Any,
            _device: Any,
            objective: Objective,
            checkpoint: Checkpoint | None,
            _source: Any,
            _penalties: Any,
        ) -> FakeEngine:
            engine = FakeEngine(objective, self.calls, on_call)
            if checkpoint is not None:
                checkpoint.restore(engine)  # type: ignore[arg-type]
            return engine

        self._monkeypatch.setattr(starting, "build_engine", build)
        self._monkeypatch.setattr(stopping.request, "asked", False)
        own = (f"data.path={self._corpus}", f"run.dir={self.folder}")
        resolved = resolve(compose([*SETTINGS, *own, *overrides]), world_size=1)
        session = Session(resolved, torch.device("cpu"), None, time.perf_counter())
        is_failed = True
        try:
            is_complete = session.train()
            is_failed = False
        finally:
            session.close(is_failed)
        return is_complete


def stop_at(wanted: str) -> Callable[[str], None]:
    """Ask this process to stop when the engine is asked `wanted`."""

    def on_call(call: str) -> None:
        if call == wanted:
            stopping.request.asked = True

    return on_call


def raise_at(wanted: str, error: BaseException) -> Callable[[str], None]:
    def on_call(call: str) -> None:
        if call == wanted:
            raise error

    return on_call


def trained(calls: Iterable[str]) -> Iterator[str]:
    """The samples of each step that an engine was asked for."""
    return (call.removeprefix("train ") for call in calls if call.startswith("train "))
