"""From a composed configuration to a run that may start: every check that needs neither torch nor a GPU."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

from llmtrain.commands.pretrained import Pretrained, expand
from llmtrain.commands.vocabulary import resolve_vocabulary
from llmtrain.config import decode
from llmtrain.corpus.config import data_config_type
from llmtrain.corpus.corpora import Corpora
from llmtrain.distributed import launcher
from llmtrain.errors import ConfigError, Problem, UserError
from llmtrain.families import (
    corpora_problems,
    data_problems,
    model_config_type,
    model_shape,
    objective_problems,
    open_data,
    recompute_problems,
)
from llmtrain.files import at_home
from llmtrain.models.convolutional.config import SimpleCNNConfig
from llmtrain.optim.config import schedule_problems
from llmtrain.parallel.layout import Layout
from llmtrain.parallel.planning import plan_layout
from llmtrain.train.config import TrainConfig

NO_PATH = "(none)"
ASSUMED_VOCABULARY = 8192
"""That of `llmtrain prepare`'s default tokenizer."""

VARIANTS = {"model": model_config_type, "data": data_config_type}


@dataclass(frozen=True)
class Resolved:
    """A run that may start: every check that needs neither torch nor a GPU is passed."""

    config: TrainConfig
    layout: Layout
    corpora: Corpora | None
    pretrained: Pretrained | None = None
    """The weights that training starts from; None: the seed's."""


def resolve(
    mapping: Mapping[str, Any], world_size: int | None = None, *, data_optional: bool = False
) -> Resolved:
    """Decode and check a composed configuration for `world_size` processes (None: as many as were
    launched). With `data_optional` no corpus need be named; a vocabulary that it would give is then
    ASSUMED_VOCABULARY.

    Raises UserError with all problems found.
    """
    section = mapping.get("data", {})
    without_data = data_optional and not section.get("path") and not section.get("mixture")
    if without_data:
        mapping = {**mapping, "data": {**section, "path": NO_PATH}}
    mapping, pretrained = expand(mapping)
    model_section = mapping.get("model", {})
    problems = objective_problems(model_section)
    # Else another objective stands in below, which wants other data than the one that was meant.
    fits_family = not problems
    if not fits_family:
        mapping = {**mapping, "model": {k: v for k, v in model_section.items() if k != "objective"}}
    try:
        config = decode(TrainConfig, mapping, VARIANTS)
    except ConfigError as error:
        raise ConfigError([*problems, *error.problems]) from error
    world_size = launcher.world_size() if world_size is None else world_size
    problems += data_problems(config.model, config.data)
    problems += [
        problem.within("schedule") for problem in schedule_problems(config.schedule, config.train.steps)
    ]
    problems += recompute_problems(config.model, config.recompute)
    problems += _resume_problems(config)
    layout: Layout | None = None
    corpora: Corpora | None = None
    model = config.model
    engine = config.engine
    if engine == "auto":
        engine = "deepspeed" if config.parallel.zero > 0 or config.parallel.pipeline > 1 else "local"
    try:
        layout = plan_layout(
            config.parallel,
            config.batch,
            engine=engine,
            precision=config.precision,
            world_size=world_size,
            device=config.cluster.device or launcher.likely_device(config.device),
            model=model_shape(config.model),
            max_grad_norm=config.optimizer.max_grad_norm,
            exact_dropout=config.exact_dropout,
            implementation=config.optimizer.implementation,
            on_this_machine=config.cluster.is_local or not data_optional,
        )
    except ConfigError as error:
        problems += error.problems
    if without_data:
        if not isinstance(model, SimpleCNNConfig) and model.vocab_size is None:
            model = replace(model, vocab_size=ASSUMED_VOCABULARY)
    elif not data_problems(config.model, config.data):
        try:
            corpora = open_data(config.data)
            if pretrained is not None and corpora is not None and (found := pretrained.problems(corpora)):
                raise ConfigError(found)
            model = resolve_vocabulary(config.model, corpora)
            if fits_family:
                problems += corpora_problems(config.model, corpora)
        except UserError as error:
            problems += error.problems
    if problems:
        raise ConfigError(problems)
    assert layout is not None
    return Resolved(replace(config, model=model, engine=engine), layout, corpora, pretrained)


def _resume_problems(config: TrainConfig) -> list[Problem]:
    resume = config.checkpoint.resume
    if resume in ("auto", "never") or at_home(resume).exists():
        return []
    if at_home(resume).resolve().is_relative_to(at_home(config.run.dir).resolve()):
        return []  # retention may have deleted what an earlier start went back to
    return [
        Problem(
            "checkpoint.resume",
            f"{resume}, no such folder",
            "auto, never, or a run folder or checkpoint",
            "auto starts anew where there is nothing to resume",
        )
    ]
