"""Early stopping: the best evaluation of a run, and whether the run ends because held-out figures no longer
improve.
Free of torch."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from llmtrain.config import require
from llmtrain.corpus.text_source import TextSource
from llmtrain.errors import Problem
from llmtrain.scoring.direction import LOSS_OF, gain
from llmtrain.scoring.texts import MEASURES
from llmtrain.train.writing_rules import rows_to_write

if TYPE_CHECKING:
    from llmtrain.train.config import TrainConfig

LOSS = "loss"


@dataclass(frozen=True)
class EarlyStoppingConfig:
    """End a run when a figure of the validation split no longer improves (Prechelt 1998)."""

    metric: str | None = None
    """Figure of an evaluation, such as `loss` or `f1_macro`; null: a run has all its steps."""
    patience: int = 3
    """Evaluations in a row without a better value after which the run ends."""
    min_delta: float = 0.0
    """How much better than the best so far a value must be to count as an improvement."""

    def problems(self) -> Iterator[Problem]:
        yield from require(self.patience >= 1, "patience", self.patience, "1 or more")
        is_size = math.isfinite(self.min_delta) and self.min_delta >= 0
        yield from require(is_size, "min_delta", self.min_delta, "0 or more")


def metric_of(config: TrainConfig) -> str:
    """Return the figure by which checkpoints of a run are the best."""
    return config.checkpoint.best or config.early_stopping.metric or LOSS


def metric_problems(config: TrainConfig, corpora: TextSource | None) -> Iterator[Problem]:
    """Yield a problem for each metric that no evaluation of this run gives."""
    measures = config.objective.measures()
    # Tasks have their losses under names of their own.
    of_sources = [f"{LOSS_OF}{name}" for name in _evaluated(corpora) if f"{name}/{LOSS}" not in measures]
    known = (LOSS, *of_sources, *measures, *(MEASURES if rows_to_write(config) else ()))
    for key, metric in (
        ("early_stopping.metric", config.early_stopping.metric),
        ("checkpoint.best", config.checkpoint.best),
    ):
        if metric is None:
            continue
        if metric not in known:
            yield Problem(key, metric, f"{', '.join(known)}, with objective={config.objective.kind}")
        elif config.evaluation.every is None:
            remedy = "give evaluation.every=…"
            yield Problem(key, f"{metric} with evaluation.every=null", "null without evaluations", remedy)
        elif corpora is not None and len(corpora.without("validation")) == len(corpora.by_name):
            got = f"{metric} without a validation split"
            yield Problem(key, got, "null without evaluations", "give data that have a validation split")


def _evaluated(corpora: TextSource | None) -> list[str]:
    """Return the corpora of a mixture that have held-out text, if there are several."""
    if corpora is None:
        return []
    without = corpora.without("validation")
    names = [name for name in corpora.by_name if name not in without]
    return names if len(names) > 1 else []


@dataclass
class History:
    """The values of one figure at the evaluations of a run, in order."""

    metric: str
    steps: list[int] = field(default_factory=list)
    values: list[float | None] = field(default_factory=list)
    """None: not defined."""
    best_figures: dict[str, float] = field(default_factory=dict)
    """All figures of the best evaluation."""

    @classmethod
    def of(cls, metric: str, recorded: Mapping[str, Any] | None) -> History:
        """Return what a checkpoint recorded; nothing if it recorded another metric."""
        if recorded is None or recorded["metric"] != metric:
            return cls(metric)
        figures = recorded.get("best_figures", {}).items()
        return cls(
            metric,
            list(recorded["steps"]),
            list(recorded["values"]),
            {name: math.nan if value is None else value for name, value in figures},
        )

    def encode(self) -> dict[str, Any]:
        """Return the history as JSON."""
        return {
            "metric": self.metric,
            "steps": list(self.steps),
            "values": list(self.values),
            "best_figures": plain(self.best_figures),
        }

    def note(self, step: int, figures: Mapping[str, float]) -> bool:
        """Add the evaluation after `step`; return whether it is the best so far."""
        value = figures.get(self.metric, math.nan)
        self.steps.append(step)
        self.values.append(value if math.isfinite(value) else None)
        is_best = self.best_step == step
        if is_best:
            self.best_figures = dict(figures)
        return is_best

    @property
    def best(self) -> tuple[int, float] | None:
        """Step and value of the best evaluation, of equal ones the first; None without any value."""
        found: tuple[int, float] | None = None
        for step, value in zip(self.steps, self.values, strict=True):
            if value is not None and (found is None or gain(self.metric, value, found[1]) > 0):
                found = step, value
        return found

    @property
    def best_step(self) -> int | None:
        return None if self.best is None else self.best[0]

    def waited(self, min_delta: float) -> int:
        """Return how many evaluations in a row, up to the last, were no better by more than `min_delta`."""
        reference: float | None = None
        count = 0
        for number, value in enumerate(self.values):
            is_better = value is not None and (
                reference is None or gain(self.metric, value, reference) > min_delta
            )
            if is_better:
                reference = value
            count = 0 if is_better or number == 0 else count + 1
        return count

    def ends(self, config: EarlyStoppingConfig) -> bool:
        """Return whether the run ends here."""
        return config.metric is not None and self.waited(config.min_delta) >= config.patience

    def why_ended(self, config: EarlyStoppingConfig) -> str:
        """Return the message about a run that ends early."""
        waited = self.waited(config.min_delta)
        return (
            f"stopped early at step {self.steps[-1]:,}: no better {self.metric} in {waited:,} evaluations; "
            f"{self.describe_best()}"
        )

    def describe_best(self) -> str:
        """Return the best evaluation in a few words."""
        if self.best is None:
            return f"{self.metric} was never defined"
        return f"the best was {self.metric} {self.best[1]:.4f} at step {self.best[0]:,}"


def plain(figures: Mapping[str, float]) -> dict[str, float | None]:
    """Return figures as JSON, None for those that are not finite."""
    return {name: value if math.isfinite(value) else None for name, value in figures.items()}
