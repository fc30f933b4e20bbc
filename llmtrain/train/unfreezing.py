"""Gradual unfreezing (ULMFiT, arXiv:1801.06146, section 3.3): what is frozen at each step."""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import dataclass, replace

from llmtrain.errors import ConfigError, Problem
from llmtrain.models.skeleton import skeleton_of
from llmtrain.optim.freezing import frozen_names
from llmtrain.train.config import TrainConfig
from llmtrain.train.methods import levels_of, patterns_of, trainable_of

KEY = "gradual.every"


@dataclass(frozen=True)
class Unfreezing:
    """At first what follows the last layer trains; every `every` steps one more level does."""

    kept: tuple[str, ...]
    """Patterns of what is frozen for good."""
    levels: tuple[tuple[str, ...], ...]
    """Patterns of each level that begins frozen and will train, in the order in which they do."""
    every: int

    def patterns(self, step: int) -> tuple[str, ...]:
        """Return patterns of what is frozen in the step after `step` completed ones."""
        waiting = self.levels[step // self.every :]
        return (*self.kept, *(pattern for level in waiting for pattern in level))

    def next_change(self, step: int) -> int | None:
        """Return the completed steps, more than `step`, after which more parameters train; None: never."""
        changes = step // self.every + 1
        return changes * self.every if changes <= len(self.levels) else None


def unfreezing_of(config: TrainConfig) -> Unfreezing | None:
    """Return the schedule of a run with method=gradual, else None."""
    if config.method != "gradual":
        return None
    levels = levels_of(config.model)
    assert levels is not None, "it was checked"
    assert config.gradual.every is not None, "it was resolved"
    lowest = config.freeze + 1 if config.freeze else 0
    waiting = tuple(patterns_of([level]) for level in reversed(levels[lowest:-1]))
    return Unfreezing(config.train.freeze, waiting, config.gradual.every)


def with_unfreezing(config: TrainConfig) -> TrainConfig:
    """Return the configuration of a run with method=gradual, with `gradual.every` resolved; any other
    unchanged. Raise ConfigError for what cannot be unfrozen within the run's steps."""
    if config.method != "gradual":
        return config
    levels = levels_of(config.model)
    if levels is None:
        got = f"gradual with model.family={config.model.family}, which has no layers to choose from"
        raise ConfigError(Problem("method", got, "full"))
    changes, steps = len(levels) - 1 - (config.freeze + 1 if config.freeze else 0), config.train.steps
    if steps <= changes:
        got = f"{steps} with method=gradual, which unfreezes {changes} times"
        remedy = "train longer, give freeze=K, or method=full"
        raise ConfigError(Problem("train.steps", got, f"{changes + 1} or more", remedy))
    every = config.gradual.every or steps // (changes + 1)
    if every * changes >= steps:
        longest = (steps - 1) // changes
        got = f"{every}, with which {changes} of them take all {steps} steps or more"
        raise ConfigError(Problem(KEY, got, f"1 to {longest}", "null divides the run evenly"))
    config = replace(config, gradual=replace(config.gradual, every=every))
    first = unfreezing_of(config)
    assert first is not None
    names = [name for name, _ in skeleton_of(config.model).named_parameters()]
    if len(frozen_names(names, first.patterns(0))) == len(names):
        got = "gradual with a head that has no parameters of its own, so that nothing trains at first"
        raise ConfigError(Problem("method", got, "full"))
    return config


def with_frozen(
    config: TrainConfig, unfreezing: Unfreezing, step: int, before: Collection[str] | None
) -> TrainConfig:
    """Return the configuration with what is frozen in the step after `step` in `train.freeze`.

    before: names of the parameters that were frozen in the checkpoint that training goes on from; what
    trained there goes on training. None: training begins.
    """
    names = [name for name, _ in skeleton_of(config.model).named_parameters()]
    frozen = frozen_names(names, unfreezing.patterns(step))
    if before is not None:
        frozen &= frozenset(before)
    train = replace(config.train, freeze=tuple(name for name in names if name in frozen))
    return replace(config, train=train)


def describe(config: TrainConfig, until: int) -> str:
    """Return how much trains, in one line."""
    trainable = trainable_of(config.model, config.train.freeze)
    total = config.model.parameter_count()
    count = total if trainable is None else trainable.parameters
    return f"until step {until:,}, {count:,} of {total:,} parameters train"
