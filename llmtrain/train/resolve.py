"""Check a composed configuration: every check of a run that needs neither torch nor a GPU."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, replace
from typing import Any

from llmtrain.config import decode
from llmtrain.corpus.text_source import TextSource
from llmtrain.data.config import data_config_type
from llmtrain.distributed import launcher
from llmtrain.errors import ConfigError, Problem, UserError
from llmtrain.files import expand_home
from llmtrain.models.registry import family_of, model_config_type
from llmtrain.nn.model_config import ModelConfig
from llmtrain.nn.recompute_config import RecomputeConfig
from llmtrain.objectives.reading import corpora_problems, data_of_plan, data_problems, open_data
from llmtrain.objectives.registry import objective_config_type
from llmtrain.optim.config import schedule_problems
from llmtrain.parallel.config import BatchConfig, EngineName, ParallelConfig
from llmtrain.parallel.elastic import Fitted, fit
from llmtrain.parallel.layout import Layout
from llmtrain.parallel.model_shape import shape_of
from llmtrain.parallel.planning import plan_layout
from llmtrain.plan.memory import Trainable
from llmtrain.train.adaptation import adaptation_problems
from llmtrain.train.auto_layout import fastest_choice, with_choice
from llmtrain.train.config import TrainConfig
from llmtrain.train.early_stopping import metric_problems
from llmtrain.train.embeddings import (
    embedding_problems,
    known_words,
    tokenizer_of_words,
    with_frozen_embedding,
)
from llmtrain.train.methods import method_problems, trainable_of, with_features, with_method
from llmtrain.train.pretrained import Pretrained, expand
from llmtrain.train.profile_config import profile_problems
from llmtrain.train.spikes_config import spike_problems
from llmtrain.train.suite_rules import suite_problems
from llmtrain.train.text_samples_rules import text_sample_problems
from llmtrain.train.unfreezing import with_unfreezing
from llmtrain.train.vocabulary import resolve_vocabulary
from llmtrain.train.writing_rules import writing_problems

NO_PATH = "(none)"
ASSUMED_VOCABULARY = 8192
"""The vocabulary size of the default tokenizer of `llmtrain prepare`."""
ASSUMED_OUTPUTS = 2
"""Outputs of the head of a task, where no data tell its labels."""

VARIANTS = {"model": model_config_type, "objective": objective_config_type, "data": data_config_type}


@dataclass(frozen=True)
class Resolved:
    """A run that may start: it has passed every check that needs neither torch nor a GPU."""

    config: TrainConfig
    layout: Layout
    corpora: TextSource | None
    pretrained: Pretrained | None = None
    """The weights that training starts from; None: random weights of the seed."""
    trainable: Trainable | None = None
    """The parameters that train, where `train.freeze` names some; None: all train."""


def resolve(
    mapping: Mapping[str, Any], world_size: int | None = None, *, data_optional: bool = False
) -> Resolved:
    """Decode and check a composed configuration for `world_size` processes (None: as many as were
    launched). With `data_optional` a corpus need not be named; a vocabulary that depends on it is then
    ASSUMED_VOCABULARY.

    Raise UserError with all problems found.
    """
    without_data = False
    if data_optional:
        section, without_data = data_of_plan(mapping.get("data", {}), mapping.get("objective"), NO_PATH)
        mapping = {**mapping, "data": section}
    config, pretrained = _decoded(mapping)
    world_size = launcher.world_size() if world_size is None else world_size
    problems = data_problems(config.objective, config.data)
    problems += method_problems(config, is_pretrained=pretrained is not None or without_data)
    problems += adaptation_problems(config)
    problems += embedding_problems(config, is_pretrained=pretrained is not None)
    fits_data = not problems
    # Heads that the objective asks for may ask something of the model.
    problems += [problem.within("model") for problem in config.model.problems()]
    problems += [
        problem.within("schedule") for problem in schedule_problems(config.schedule, config.train.steps)
    ]
    problems += _recompute_problems(config.model, config.recompute)
    problems += _resume_problems(config)
    layout: Layout | None = None
    corpora: TextSource | None = None
    model = config.model
    engine = _engine_of(config)
    try:
        is_here = config.cluster.is_local or not data_optional
        config = _with_auto_layout(config, world_size, on_this_machine=is_here)
        engine = _engine_of(config)
        fitted = _fitted(config, world_size, on_this_machine=is_here)
        layout = fitted.layout
        config = replace(config, parallel=fitted.parallel, batch=fitted.batch)
    except ConfigError as error:
        problems += error.problems
    if without_data:
        model = _assumed(model)
    elif fits_data:
        try:
            tokenizer = tokenizer_of_words(config) if pretrained is None else pretrained.tokenizer
            corpora = open_data(config.objective, config.data, tokenizer)
            if (
                pretrained is not None
                and corpora is not None
                and (found := pretrained.problems(corpora, config.data))
            ):
                raise ConfigError(found)
            if config.embeddings.path is not None and corpora is not None:
                known_words(config, corpora)
            model = resolve_vocabulary(config.model, config.objective, corpora)
            problems += corpora_problems(config.objective, corpora)
            objective = config.objective.with_labels(corpora)
            objective, model = objective.measured(model, config.data)
            config = replace(config, objective=objective)
            if config.train.epochs is not None:
                config = _with_steps_of_epochs(config, model, corpora)
        except UserError as error:
            problems += error.problems
    problems += metric_problems(config, corpora)
    problems += writing_problems(config)
    problems += text_sample_problems(config)
    problems += suite_problems(config)
    problems += spike_problems(config)
    size = None if layout is None else layout.world_size
    problems += profile_problems(config.profile, config.train.steps, size)
    if problems:
        raise ConfigError(problems)
    assert layout is not None
    config = _with_what_trains(replace(config, model=model, engine=engine))
    return Resolved(config, layout, corpora, pretrained, trainable_of(config.model, config.train.freeze))


def _assumed(model: ModelConfig) -> ModelConfig:
    """Return the model with sizes that only data tell."""
    if model.lacks_vocab_size:
        model = replace(model, vocab_size=ASSUMED_VOCABULARY)  # type: ignore[type-var]
    if model.task is not None:
        model = replace(model, task=model.task.assuming(ASSUMED_OUTPUTS))  # type: ignore[type-var]
    return model


def _with_what_trains(config: TrainConfig) -> TrainConfig:
    """Return the configuration with what its method adds and freezes. The model's sizes must be known."""
    config = with_frozen_embedding(with_method(config))
    return with_features(with_unfreezing(config))


def _with_auto_layout(config: TrainConfig, world_size: int, *, on_this_machine: bool) -> TrainConfig:
    """Return the configuration with the fastest layout, if it asks for `parallel=auto`."""
    if not config.parallel.auto:
        return config
    whole = _with_what_trains(replace(config, model=_assumed(config.model)))
    trainable = trainable_of(whole.model, whole.train.freeze)
    choice = fastest_choice(whole, trainable, world_size, on_this_machine=on_this_machine)
    return with_choice(config, choice)


def _decoded(mapping: Mapping[str, Any]) -> tuple[TrainConfig, Pretrained | None]:
    """Return the configuration, and the weights that training starts from, before data tell the rest."""
    mapping, pretrained = expand(mapping)
    mapping = {**mapping, "objective": objective_section(mapping)}
    config = decode(TrainConfig, mapping, VARIANTS)
    model = config.model
    objective = config.objective.following(model)
    if pretrained is not None:
        grows = bool(objective.new_tokens)
        pretrained = replace(pretrained, keeps_head=objective.keeps_head(model), grows=grows)
    if model.task is not None and not objective.has_task_head:
        model = replace(model, task=None)  # type: ignore[type-var]
    config = replace(config, objective=objective, model=objective.fitted(model))
    return config, pretrained


def _engine_of(config: TrainConfig) -> EngineName:
    """Return the engine that runs the layout."""
    if config.engine != "auto":
        return config.engine
    return "deepspeed" if config.parallel.zero > 0 or config.parallel.pipeline > 1 else "local"


def _fitted(
    config: TrainConfig, world_size: int, on_this_machine: bool, is_elastic: bool | None = None
) -> Fitted:
    """Return the layout on `world_size` processes. is_elastic: whether axes may shrink; None: if the launcher
    says so. Raise ConfigError if none fits."""

    def plan(parallel: ParallelConfig, batch: BatchConfig) -> Layout:
        return plan_layout(
            parallel,
            batch,
            engine=_engine_of(config),
            precision=config.precision,
            world_size=world_size,
            device=config.cluster.device or launcher.likely_device(config.device),
            model=shape_of(config.model),
            max_grad_norm=config.optimizer.max_grad_norm,
            exact_dropout=config.exact_dropout,
            implementation=config.optimizer.implementation,
            on_this_machine=on_this_machine,
        )

    if not (launcher.is_elastic() if is_elastic is None else is_elastic):
        return Fitted(plan(config.parallel, config.batch), config.parallel, config.batch)
    return fit(config.parallel, config.batch, world_size, plan)


def layout_refusals(mapping: Mapping[str, Any], sizes: Iterable[int]) -> dict[int, str]:
    """Return, for each number of processes that has no layout within the bounds of `parallel.elastic`, why
    the one that was asked for does not fit. Raise UserError for a wrong configuration."""
    config, _ = _decoded(mapping)
    refused = {}
    for size in sizes:
        try:
            fitted = _with_auto_layout(config, size, on_this_machine=True)
            _fitted(fitted, size, on_this_machine=True, is_elastic=True)
        except ConfigError as error:
            refused[size] = str(error.problems[0])
    return refused


def _with_steps_of_epochs(config: TrainConfig, model: ModelConfig, corpora: TextSource | None) -> TrainConfig:
    """Return the configuration with the steps that `train.epochs` take."""
    assert config.train.epochs is not None
    length = config.batch.sequence_length
    sources = config.objective.open(model, config.data, corpora, "train", length)
    if len(sources) != 1 and not config.data.is_table:
        got = f"{config.train.epochs:g} with {len(sources)} sources, whose epochs end at different steps"
        raise ConfigError(Problem("train.epochs", got, "null with a mixture", "give train.steps=…"))
    samples = sum(map(len, sources.values()))
    steps = math.ceil(config.train.epochs * samples / config.batch.global_size)
    return replace(config, train=replace(config.train, steps=max(1, steps)))


def _resume_problems(config: TrainConfig) -> list[Problem]:
    resume = config.checkpoint.resume
    if resume in ("auto", "never") or expand_home(resume).exists():
        return []
    if expand_home(resume).resolve().is_relative_to(expand_home(config.run.dir).resolve()):
        return []  # retention may have deleted the checkpoint that an earlier start went back to
    return [
        Problem(
            "checkpoint.resume",
            f"{resume}, no such folder",
            "auto, never, or a run folder or checkpoint",
            "auto begins a new run where there is nothing to resume",
        )
    ]


def objective_section(mapping: Mapping[str, Any]) -> Mapping[str, Any]:
    """Return the `objective` section of a run; where it names none, the one of the model's family.

    Raise ConfigError for a model whose section is wrong."""
    section = mapping.get("objective")
    if section:
        return section
    model = mapping.get("model") or {}
    try:
        config: ModelConfig = decode(model_config_type(model), model)
    except ConfigError as error:
        raise ConfigError(problem.within("model") for problem in error.problems) from error
    return family_of(config).objective(config)


def _recompute_problems(model: ModelConfig, recompute: RecomputeConfig) -> list[Problem]:
    if recompute.mode == "none" or family_of(model).has_stages:
        return []
    got = f"{recompute.mode} with model.family={model.family}, which has no layers"
    return [Problem("recompute.mode", got, "none", "set recompute=none")]
