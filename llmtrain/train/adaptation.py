"""The methods of fine-tuning that train a few parameters beside a frozen model: lora, adapter, bitfit."""

from __future__ import annotations

import re
from collections.abc import Collection, Iterator, Sequence
from dataclasses import fields, replace
from fnmatch import fnmatchcase

from llmtrain.adapt.config import Adaptation
from llmtrain.config import require
from llmtrain.errors import ConfigError, Problem
from llmtrain.models.skeleton import of_vocabulary, skeleton_of
from llmtrain.nn.model_config import ModelConfig
from llmtrain.optim.groups import HEAD
from llmtrain.train.config import TrainConfig

BITFIT = "bitfit"
_LAYER = re.compile(r"\.\d+(?=\.)")


def trains_beside(config: TrainConfig) -> bool:
    """Return whether the method trains a few parameters, whose checkpoints leave out the others."""
    return config.method == BITFIT or _wanted(config) is not None


def with_adaptation(config: TrainConfig) -> TrainConfig:
    """Return the configuration with what its method adds to the model, and with all else in `train.freeze`.
    Return that of another method unchanged.

    Raise ConfigError for a model that the method does not fit, and for one that has been adapted already and
    not merged.
    """
    wanted, held = _wanted(config), adaptation_of(config.model)
    if held is not None and wanted == held.usual:
        wanted = held  # settings that nobody changed are those of the folder
    if held is not None and held != wanted:
        got = f"{config.method} with {_described(held)} in the model of model.path"
        remedy = "go on with it, or merge it first: llmtrain export checkpoint=… output=… form=merged"
        raise ConfigError(Problem("method", got, f"{held.method} with the same settings", remedy))
    if not trains_beside(config):
        return config
    model = config.model
    if wanted is not None:
        if not model.can_be_adapted:
            got = f"{config.method} with model.family={model.family}"
            raise ConfigError(Problem("method", got, "full", "that family cannot be adapted"))
        model = replace(model, adaptation=wanted)  # type: ignore[type-var]
    from llmtrain.nn.initialize import added_to

    skeleton = skeleton_of(model)
    names = [name for name, _ in skeleton.named_parameters()]
    trained = set(added_to(skeleton))
    if config.method == BITFIT:
        trained |= {name for name in names if name.endswith(".bias")}
        if not trained:
            got = f"{BITFIT} with model.family={model.family}, this model of which has no biases"
            raise ConfigError(Problem("method", got, "lora"))
    if config.objective.new_tokens:
        # Their rows have learned nothing yet.
        trained |= set(of_vocabulary(model, skeleton))
    if model.task is not None:
        trained |= {name for name in names if name.startswith(f"{HEAD}.")}
    frozen = _patterns([name for name in names if name not in trained], trained)
    steps = replace(config.train, freeze=(*config.train.freeze, *frozen))
    return replace(config, model=model, train=steps)


def adaptation_problems(config: TrainConfig) -> Iterator[Problem]:
    """Yield a problem for each key that does not go with the method; known before the data are read."""
    wanted = _wanted(config)
    if wanted is None or not wanted.virtual_tokens:
        return
    if config.objective.data != "table":
        got = f"{config.objective.kind} with method={wanted.method}, whose rows hold several documents"
        yield Problem("objective", got, "a task over a table", "the virtual tokens belong to one text")
    if config.objective.packs_texts:
        got = f"true with method={wanted.method}, whose virtual tokens belong to one text"
        yield Problem("objective.packing", got, "false")
    positions, longest = config.model.max_sequence_length, config.batch.sequence_length
    if positions is not None and longest + wanted.virtual_tokens > positions:
        got = f"{longest}, with {wanted.virtual_tokens} virtual tokens before them"
        yield Problem("batch.sequence_length", got, f"1 to {max(1, positions - wanted.virtual_tokens)}")
    if wanted.is_in_rows:
        parallel, allowed = config.parallel, f"with method={wanted.method}, whose rows begin on one rank"
        yield from require(parallel.sequence == 1, "parallel.sequence", parallel.sequence, f"1 {allowed}")
        yield from require(
            not parallel.tensor_sequence, "parallel.tensor_sequence", "true", f"false {allowed}"
        )


def adaptation_of(model: ModelConfig) -> Adaptation | None:
    """Return what was added to the model."""
    found: Adaptation | None = model.adaptation
    return found


def _wanted(config: TrainConfig) -> Adaptation | None:
    sections: tuple[Adaptation, ...] = (config.lora, config.adapter, config.prefix, config.prompt)
    by_method: dict[str, Adaptation] = {section.method: section for section in sections}
    return by_method.get(config.method)


def _described(held: Adaptation) -> str:
    settings = ((field.name, getattr(held, field.name)) for field in fields(held) if field.name != "method")
    return f"{held.method} ({', '.join(f'{key}={value}' for key, value in settings)})"


def _patterns(names: Sequence[str], others: Collection[str]) -> tuple[str, ...]:
    """Return patterns that match all of `names` and none of `others`, one for all layers where it can be."""
    found: dict[str, None] = {}
    for name in names:
        pattern = _LAYER.sub(".*", name)
        found[name if any(fnmatchcase(other, pattern) for other in others) else pattern] = None
    return tuple(found)
