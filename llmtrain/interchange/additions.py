"""Take what fine-tuning added to a model away, or put another's on it."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from pathlib import Path

import torch

from llmtrain.checkpoint import retention
from llmtrain.errors import CheckpointError, ConfigError, Problem
from llmtrain.interchange.base import Given, base_of
from llmtrain.interchange.trained import TrainedModel, load_trained
from llmtrain.models.skeleton import skeleton_of
from llmtrain.standard_streams import print_note


def without_additions(trained: TrainedModel) -> TrainedModel:
    """Return a model without what was added to it. Raise ConfigError if nothing was, or what is there now has
    values of its own, such as biases, in the place of the base's."""
    if trained.config.adaptation is None:
        allowed = "true, or a model that was trained by lora, adapter, prefix or prompt"
        raise ConfigError(Problem("adapter", f"false, with {trained.source}", allowed))
    config = replace(trained.config, adaptation=None)  # type: ignore[type-var]
    names = [name for name, _ in skeleton_of(config).named_parameters()]
    if trained.base is not None and (changed := [name for name in names if name not in trained.left_out]):
        got = f"false, with {trained.source}, which trained {changed[0]} too"
        raise ConfigError(Problem("adapter", got, "true", "give the base as checkpoint=…"))
    return replace(trained, config=config, weights=_Some(trained.weights, names))


def with_additions(base: Given, name: str, path: Path) -> TrainedModel:
    """Return the model of the folder `base` with the additions of the run or checkpoint `path`.

    Raise CheckpointError if that has none, or was trained over another base."""
    checkpoint = retention.find(path, print_note)
    record = base_of(checkpoint)
    where = f"adapters.{name}"
    if record is None:
        got = f"{path}, which holds a whole model"
        raise CheckpointError(
            Problem(where, got, "a run with method=lora, adapter, prefix, prompt or bitfit")
        )
    if record.digest != base.digest:
        got = f"{path}, which was trained over {record.path}"
        raise CheckpointError(Problem(where, got, f"one that was trained over {base.path}"))
    return load_trained(path, base)


class _Some(Mapping[str, torch.Tensor]):
    """Some of a model's weights, each read on access."""

    def __init__(self, weights: Mapping[str, torch.Tensor], names: Sequence[str]) -> None:
        self._weights, self._names = weights, names

    def __getitem__(self, name: str) -> torch.Tensor:
        return self._weights[name]

    def __iter__(self) -> Iterator[str]:
        return iter(self._names)

    def __len__(self) -> int:
        return len(self._names)
