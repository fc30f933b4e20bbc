"""One task of a model that learned several: its trunk with the head of that task."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import replace
from typing import TYPE_CHECKING

from llmtrain.errors import ConfigError, Problem
from llmtrain.models.skeleton import skeleton_of

if TYPE_CHECKING:
    from torch import Tensor

    from llmtrain.interchange.trained import Described, TrainedModel
    from llmtrain.nn.model_config import ModelConfig

_HEADS = "head.tasks."


class _Weights(Mapping[str, "Tensor"]):
    """The weights of the trunk and of one head, read on access."""

    def __init__(self, weights: Mapping[str, Tensor], task: str, config: ModelConfig) -> None:
        """config: of the model that has the one head alone."""
        self._weights = weights
        wanted = [name for name, _ in skeleton_of(config).named_parameters()]
        self._names = {name: name for name in wanted}
        self._names |= {n: n.replace("head.", f"{_HEADS}{task}.", 1) for n in wanted if n.startswith("head.")}

    def __getitem__(self, name: str) -> Tensor:
        return self._weights[self._names[name]]

    def __iter__(self) -> Iterator[str]:
        return iter(self._names)

    def __len__(self) -> int:
        return len(self._names)


def model_of(trained: TrainedModel, task: str | None) -> TrainedModel:
    """Return the model of one task; a model of one task unchanged. Raise ConfigError for a task that it does
    not have, and for none where it has several."""
    if _is_whole(trained.config, task):
        return trained
    assert task is not None
    config, fresh = _config_of(trained.config, task), trained.fresh
    weights = _Weights(trained.weights, task, config)
    kept = tuple(name for name in weights if name in fresh)
    return replace(
        trained, config=config, objective=trained.objective.of_task(task), weights=weights, fresh=kept
    )


def described_of(described: Described, task: str | None) -> Described:
    """Return what a folder says of one task, as `model_of` does."""
    if _is_whole(described.config, task):
        return described
    assert task is not None
    data = described.data
    if data is not None:
        tables = data["tasks"]
        data = {**tables[task], "kind": "table", "tokenizer": data.get("tokenizer")}
    config, objective = _config_of(described.config, task), described.objective.of_task(task)
    return described._replace(config=config, objective=objective, data=data)


def _is_whole(config: ModelConfig, task: str | None) -> bool:
    """Return whether the model has one task. Raise ConfigError as `model_of` does."""
    heads = {} if config.task is None else config.task.by_name
    names = [name for name, head in heads.items() if not head.is_of_vocabulary]
    if not names:
        if task is not None:
            raise ConfigError(Problem("task", task, "null with a model of one task", "leave it out"))
        return True
    if task not in names:
        raise ConfigError(Problem("task", task or "nothing", ", ".join(names), f"give task={names[0]}"))
    return False


def _config_of(config: ModelConfig, task: str) -> ModelConfig:
    assert config.task is not None
    return replace(config, task=config.task.by_name[task])  # type: ignore[type-var]
