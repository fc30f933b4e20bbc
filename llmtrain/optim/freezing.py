"""Which parameters of a model train, by patterns over their canonical names."""

from __future__ import annotations

from collections.abc import Collection, Iterator, Sequence
from fnmatch import fnmatchcase
from typing import TYPE_CHECKING

from llmtrain.errors import Problem, nearest

if TYPE_CHECKING:
    from torch import nn

KEY = "train.freeze"


def frozen_names(names: Collection[str], patterns: Sequence[str]) -> frozenset[str]:
    """Return those of `names` that a pattern matches, as fnmatch does, by case."""
    return frozenset(name for name in names if any(fnmatchcase(name, pattern) for pattern in patterns))


def freeze_problems(names: Collection[str], patterns: Sequence[str]) -> Iterator[Problem]:
    """Yield a problem for each pattern that matches none of `names`, and one where nothing trains."""
    for i, pattern in enumerate(patterns):
        if not frozen_names(names, [pattern]):
            got = f"{pattern!r}, which no parameter's name matches"
            yield Problem(f"{KEY}[{i}]", got, nearest(pattern, names))
    if names and len(frozen_names(names, patterns)) == len(names):
        got = f"{', '.join(patterns)}, all {len(names):,} parameters"
        yield Problem(KEY, got, "some that train", "leave out what shall be trained")


def freeze(model: nn.Module, patterns: Sequence[str]) -> None:
    """Turn gradients off for the parameters that a pattern matches. A tied weight goes by its first name."""
    named = dict(model.named_parameters())
    for name in frozen_names(named, patterns):
        named[name].requires_grad_(False)
