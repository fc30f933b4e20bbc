"""Detect the bad steps of a run, and decide how the run goes on.

A bad step changes nothing (engine/gate.py); its samples are gone. After several in a row a run with
on_spike=rollback goes back to the last checkpoint before them, and leaves out all samples that it has drawn
since: with the same samples it would come to the same weights.

All of it is on record, so that a run that is killed and resumed goes on as one that was not: the window of
losses and norms is in each checkpoint; a rollback changes the timeline, by which a resumed run and
`data trace` draw their samples; and events.jsonl names each decision.
"""

from __future__ import annotations

import math
from collections import deque
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

from llmtrain.checkpoint import retention, store
from llmtrain.data.mixture import Timeline
from llmtrain.distributed import processes
from llmtrain.errors import Problem, TrainingError
from llmtrain.standard_streams import Say
from llmtrain.train.config import StepsConfig

LEAST_DEVIATION = 0.01
"""Least deviation as a share of the mean: where losses hardly differ, noise would be a spike."""
ADVICE = "lower optimizer.lr, or set optimizer.max_grad_norm or precision=fp32"


class Note(Protocol):
    """Records an event of the run."""

    def __call__(self, kind: str, step: int | None = None, **facts: Any) -> None: ...


@dataclass(frozen=True)
class _Window:
    """Values of the last steps that were taken."""

    values: deque[float]

    def fault(self, name: str, value: float, deviations: float) -> str | None:
        """Return why a value is bad; None if it is not."""
        if not math.isfinite(value):
            return f"{name} {value}"
        if len(self.values) < (self.values.maxlen or 0):
            return None
        # Exact sums: ranks on different processors must decide alike.
        mean = math.fsum(self.values) / len(self.values)
        variance = math.fsum((past - mean) ** 2 for past in self.values) / len(self.values)
        deviation = max(math.sqrt(variance), LEAST_DEVIATION * abs(mean))
        above = (value - mean) / deviation if deviation else math.inf if value > mean else 0.0
        if above <= deviations:
            return None
        of = f"the mean {mean:.4g} of {len(self.values)} steps"
        return f"{name} {value:.4g}, {above:.1f} deviations above {of}"


class BadSteps:
    """Decides about the steps of a run. All ranks call its methods alike, with the same numbers."""

    def __init__(self, config: StepsConfig, recorded: Mapping[str, Any] | None) -> None:
        """recorded: the result of `recorded` in the checkpoint that the run resumes from."""
        recorded = recorded or {}
        self._config = config.spikes
        self.on_spike = config.on_spike
        size = self._config.window
        self._losses = _Window(deque(recorded.get("losses", ()), size))
        self._norms = _Window(deque(recorded.get("norms", ()), size))
        self.in_a_row: int = recorded.get("in_a_row", 0)
        """Bad steps since the last one that was taken."""
        self.rollbacks: int = recorded.get("rollbacks", 0)
        self.why = ""
        """Why the last bad step is bad."""

    def accepts(self, loss: float, norm: float) -> bool:
        """Return whether a step may be taken, and record it."""
        deviations = self._config.deviations
        faults = (
            self._losses.fault("loss", loss, deviations),
            self._norms.fault("gradient norm", norm, deviations),
        )
        found = [fault for fault in faults if fault is not None]
        if found:
            self.why = found[0]
            self.in_a_row += 1
            return False
        self._losses.values.append(loss)
        self._norms.values.append(norm)
        self.in_a_row = 0
        return True

    @property
    def is_too_many(self) -> bool:
        """Whether the run cannot go on from here."""
        return self.on_spike == "stop" or self.in_a_row >= self._config.in_a_row

    @property
    def may_go_back(self) -> bool:
        return self.on_spike == "rollback" and self.rollbacks < self._config.rollbacks

    def recorded(self) -> dict[str, Any]:
        """Return what the manifest of a checkpoint says, as JSON."""
        losses, norms = list(self._losses.values), list(self._norms.values)
        state = {"losses": losses, "norms": norms, "in_a_row": self.in_a_row, "rollbacks": self.rollbacks}
        return {"spikes": state}


class SpikeGuard:
    """Handles the bad steps of a run folder: reports and records them, and sends the run back. All ranks call
    its
    methods alike."""

    def __init__(
        self,
        config: StepsConfig,
        recorded: Mapping[str, Any] | None,
        root: Path,
        timeline: Timeline,
        say: Say,
        note: Note,
        finish_save: Callable[[], None],
    ) -> None:
        """root: the folder of the run's checkpoints; timeline: by which this start draws its samples."""
        self._steps = BadSteps(config, recorded)
        self._root, self._timeline = root, timeline
        self._say, self._note, self._finish_save = say, note, finish_save

    @property
    def accepts(self) -> Callable[[float, float], bool] | None:
        """What an engine asks about each step; None: all steps are taken."""
        return None if self._steps.on_spike is None else self._steps.accepts

    def recorded(self) -> dict[str, Any]:
        """Return what the manifest of a checkpoint says, as JSON."""
        return {} if self._steps.on_spike is None else self._steps.recorded()

    def rejected(self, step: int) -> bool:
        """Record that the `step`-th step was not taken. Return whether the run has gone back and begins
        again from its newest checkpoint; raise TrainingError where it stops."""
        steps = self._steps
        if not steps.is_too_many:
            self._say(f"step {step:,}: skipped: {steps.why}")
            self._note("skip", step, why=steps.why)
            return False
        self._finish_save()
        if not steps.may_go_back:
            raise processes.everywhere(TrainingError(self._stop(step)))
        self._note("skip", step, why=steps.why)
        self._go_back(step)
        return True

    def _stop(self, step: int) -> Problem:
        steps = self._steps
        row = "" if steps.in_a_row == 1 else f", after {steps.in_a_row - 1} more bad steps in a row"
        went = f", after going back {steps.rollbacks} times" if steps.rollbacks else ""
        allowed = "steps near those before (train.spikes)"
        remedy = f"{ADVICE}, then resume"
        return Problem(f"step {step}", f"{steps.why}{row}{went}", allowed, remedy)

    def _go_back(self, step: int) -> None:
        """Go back from `step` steps to the newest good checkpoint before the bad ones."""
        steps = self._steps
        first = step - steps.in_a_row
        found, _ = retention.newest_good(self._root, self._say, at_most=first)
        if found is None:
            row = f"{steps.in_a_row} bad steps in a row"
            got = f"{steps.why}, {row}, and no checkpoint of step {first} or before"
            remedy = f"lower checkpoint.every, or {ADVICE}, then resume"
            problem = Problem(f"step {step}", got, "a checkpoint to go back to", remedy)
            raise processes.everywhere(TrainingError(problem))
        timeline = self._timeline.leaving_out(found.step, step - found.step)
        before = found.manifest.get("spikes") or {}
        changes = {
            "timeline": timeline.encode(),
            "spikes": {**before, "in_a_row": 0, "rollbacks": steps.rollbacks + 1},
        }
        left_out = self._timeline.samples(found.step).start, self._timeline.samples(step).start - 1

        def change() -> None:
            # Whichever comes first, a run that is killed between them comes here again.
            store.amend(found.path, changes)
            retention.set_aside_after(self._root, found.step, self._say)

        processes.on_main(change)
        samples = f"samples {left_out[0]:,} to {left_out[1]:,}"
        why = f"{steps.in_a_row} bad steps in a row, the last with {steps.why}"
        self._say(f"step {step:,}: back to the checkpoint of step {found.step:,}, without {samples}: {why}")
        self._note("rollback", found.step, why=steps.why, after=step, samples=left_out)
