"""Which parameters share an optimizer group, and the learning rate of each. Does not import torch."""

from __future__ import annotations

from collections.abc import Collection, Iterator, Mapping, Sequence
from typing import NamedTuple

from llmtrain.errors import Problem
from llmtrain.optim.config import OptimizerConfig

HEAD = "head"
"""Module of a model that makes predictions of hidden states."""

Levels = Sequence[Sequence[str]]
"""The modules of a model by depth: the embeddings, each layer from the bottom, and what follows the last."""


class Penalty(NamedTuple):
    """A term of the loss: `factor` times the squared Euclidean distance of the parameters from the values
    that they started from, or from 0."""

    factor: float = 0.0
    to_start: bool = False


class Group(NamedTuple):
    """What parameters of one optimizer group have in common."""

    decays: bool
    """Whether weight decay applies: to parameters of two or more dimensions, not to norms and biases."""
    rate: float = 1.0
    """Multiple of the step's learning rate."""
    updates: float = 0.0
    """Optimizer steps that they had when the engine was built. ZeRO holds a group as one tensor with one step
    counter, so parameters that began to train later need a group of their own."""
    penalty: Penalty = Penalty()

    @property
    def place(self) -> tuple[bool, float, float, Penalty]:
        """Return what groups are sorted by: those with weight decay first, then the fastest."""
        return not self.decays, -self.rate, -self.updates, self.penalty


def level_of(name: str, levels: Levels) -> int | None:
    """Return the level that has the parameter `name`, or None."""
    for number, modules in enumerate(levels):
        if any(name.startswith(f"{module}.") for module in modules):
            return number
    return None


def rates(names: Collection[str], levels: Levels, config: OptimizerConfig) -> dict[str, float]:
    """Return the multiple of the learning rate of each parameter.

    With `layer_decay` (arXiv:1801.06146, section 3.2, as discriminative fine-tuning; ELECTRA,
    arXiv:2003.10555, appendix B, for a Transformer) it is layer_decay^d at a distance of d levels from the
    head: the top layer has d = 1, the embeddings the greatest. The head has `head_lr` or 1.
    """
    found = {}
    for name in names:
        level = level_of(name, levels)
        distance = 0 if level is None else len(levels) - 1 - level
        found[name] = config.layer_decay**distance
        if config.head_lr is not None and name.startswith(f"{HEAD}."):
            found[name] = config.head_lr / config.lr
    return found


def rate_problems(
    names: Collection[str], levels: Levels | None, family: str, config: OptimizerConfig
) -> Iterator[Problem]:
    """Yield a problem for each rate that a model cannot have; keys are relative to the optimizer.

    names: its parameters. levels: None for a model that has none.
    """
    if config.layer_decay != 1.0 and levels is None:
        got = f"{config.layer_decay:g} with model.family={family}, which has no layers to choose from"
        yield Problem("layer_decay", got, "1.0")
    if config.head_lr is not None and not any(name.startswith(f"{HEAD}.") for name in names):
        got = f"{config.head_lr:g} with a model whose head has no parameters of its own"
        yield Problem("head_lr", got, "null")


def make_groups(
    shapes: Mapping[str, Sequence[int]],
    rates: Mapping[str, float],
    updates: Mapping[str, float],
    penalties: Mapping[str, Penalty] | None = None,
) -> dict[str, Group]:
    """Return the group of each parameter.

    shapes: of the whole parameters; rates, updates, penalties: 1, 0 and none for those that they lack.
    """
    held = penalties or {}
    return {
        name: Group(len(shape) >= 2, rates.get(name, 1.0), updates.get(name, 0.0), held.get(name, Penalty()))
        for name, shape in shapes.items()
    }
