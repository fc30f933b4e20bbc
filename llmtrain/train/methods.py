"""Determine which parameters train in a run, by the keys `method`, `freeze`, `train.freeze` and those of the
optimizer."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import replace

from llmtrain.errors import ConfigError, Problem
from llmtrain.models.registry import family_of
from llmtrain.models.skeleton import skeleton_of
from llmtrain.nn.model_config import ModelConfig
from llmtrain.objectives.registry import OBJECTIVES
from llmtrain.optim.freezing import freeze, freeze_problems
from llmtrain.optim.groups import HEAD, rate_problems
from llmtrain.plan.memory import Trainable
from llmtrain.train.adaptation import with_adaptation
from llmtrain.train.config import TrainConfig


def with_method(config: TrainConfig) -> TrainConfig:
    """Return the configuration with the layers of `freeze` among the patterns of `train.freeze`. The model's
    sizes must be resolved.

    Raise ConfigError for what the model cannot do.
    """
    config = with_adaptation(config)
    if config.freeze or _has_rates(config):
        config = _with_frozen_layers(config)
    return config


def method_problems(config: TrainConfig, is_pretrained: bool) -> Iterator[Problem]:
    """Yield a problem for each key that does not go with the method; known before the data are read."""
    if config.method != "full" and not is_pretrained:
        got, allowed = f"{config.method} with a model that starts from the seed", "full"
        yield Problem("method", got, allowed, "give model.path=…, whose layers have learned")
    yield from _transfer_problems(config, is_pretrained)
    if config.method != "features":
        return
    if not config.objective.pools:
        tasks = ", ".join(name for name, kind in OBJECTIVES.items() if kind.pools)
        got = f"{config.objective.kind} with method=features, which has one vector for each text"
        yield Problem("objective", got, tasks, "give method=full or method=gradual")
    for axis in ("zero", "tensor", "pipeline", "sequence"):
        size, usual = getattr(config.parallel, axis), 0 if axis == "zero" else 1
        if size != usual:
            got = f"{size} with method=features, whose ranks hold whole models"
            yield Problem(f"parallel.{axis}", got, str(usual))


def _transfer_problems(config: TrainConfig, is_pretrained: bool) -> Iterator[Problem]:
    """Yield a problem for each term of transfer that has no weights to act on."""
    method, transfer = config.method, config.transfer
    where = "a model that starts from the seed"
    if is_pretrained:
        where = f"method={method}, which leaves the weights of model.path as they are"
    if not is_pretrained or method in ("features", "lora", "adapter", "prefix", "prompt"):
        for key in ("l2_sp", "l2_new"):
            if factor := getattr(transfer, key):
                yield Problem(f"transfer.{key}", f"{factor:g} with {where}", "0")
    elif transfer.l2_sp and method == "gradual" and config.optimizer.name == "sgd":
        # ZeRO would hold weights that begin to train with those that have moved already.
        got = f"{transfer.l2_sp:g} with method=gradual and optimizer=sgd, which counts no steps"
        yield Problem("transfer.l2_sp", got, "0", "give optimizer=adamw")


def with_features(config: TrainConfig) -> TrainConfig:
    """Return the configuration of a run with method=features: of one step, in which the head alone changes.
    Return any other unchanged."""
    if config.method != "features":
        return config
    modules = (name.split(".")[0] for name, _ in skeleton_of(config.model).named_parameters())
    trunk = tuple(f"{module}.*" for module in dict.fromkeys(modules) if module != HEAD)
    return replace(config, train=replace(config.train, steps=1, freeze=trunk))


def _has_rates(config: TrainConfig) -> bool:
    return config.optimizer.layer_decay != 1.0 or config.optimizer.head_lr is not None


def _with_frozen_layers(config: TrainConfig) -> TrainConfig:
    levels, family = levels_of(config.model), config.model.family
    names = [name for name, _ in skeleton_of(config.model).named_parameters()]
    problems = [p.within("optimizer") for p in rate_problems(names, levels, family, config.optimizer)]
    if config.freeze and levels is None:
        got = f"{config.freeze} with model.family={family}, which has no layers to choose from"
        problems.append(Problem("freeze", got, "0", "name parameters instead: train.freeze=[embedding.*]"))
    elif levels is not None and config.freeze > len(levels) - 2:
        allowed = f"0 to {len(levels) - 2}, the layers of the model"
        problems.append(Problem("freeze", str(config.freeze), allowed))
    if problems:
        raise ConfigError(problems)
    if not config.freeze or levels is None:
        return config
    frozen = patterns_of(levels[: config.freeze + 1])
    return replace(config, train=replace(config.train, freeze=(*config.train.freeze, *frozen)))


def levels_of(model: ModelConfig) -> list[list[str]] | None:
    """Return the modules of the model by depth (see HasLevels), or None if it has no layers."""
    from llmtrain.nn.stages import HasLevels

    skeleton = skeleton_of(model)
    return skeleton.levels() if isinstance(skeleton, HasLevels) else None


def patterns_of(levels: Sequence[Sequence[str]]) -> tuple[str, ...]:
    """Return patterns for `train.freeze` that match the parameters of these levels."""
    return tuple(f"{module}.*" for level in levels for module in level)


def trainable_of(model: ModelConfig, patterns: Sequence[str]) -> Trainable | None:
    """Return the parameters that train, or None when `patterns` is empty and all do. Raise ConfigError for a
    pattern that matches nothing, and when nothing is left to train."""
    if not patterns:
        return None
    from llmtrain.nn.initialize import added_to

    skeleton = skeleton_of(model)
    if problems := list(freeze_problems([name for name, _ in skeleton.named_parameters()], patterns)):
        raise ConfigError(problems)
    freeze(skeleton, patterns)
    steps = [stage.modules.values() for stage in skeleton.stages()] if family_of(model).has_stages else []  # type: ignore[operator]
    added = {p for name, p in skeleton.named_parameters() if name in added_to(skeleton)}
    shares, counts = [], []
    for modules in steps or [[skeleton]]:
        held = {p: p.numel() for module in modules for p in module.parameters()}
        trained = sum(count for p, count in held.items() if p.requires_grad)
        counts.append(sum(count for p, count in held.items() if p in added))
        shares.append(trained / max(1, sum(held.values()) - counts[-1]))
    trains = sum(p.numel() for p in skeleton.parameters() if p.requires_grad)
    return Trainable(trains, tuple(shares), tuple(counts) if added else ())
