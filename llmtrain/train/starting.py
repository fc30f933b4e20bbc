"""The point at which a start of a run begins, and its engine."""

from __future__ import annotations

import gc
from collections.abc import Collection
from dataclasses import dataclass

import torch

from llmtrain.checkpoint.finite import FiniteCheck
from llmtrain.checkpoint.reader import Checkpoint
from llmtrain.distributed import processes
from llmtrain.engine.base import Engine
from llmtrain.engine.build import build_engine, seed_source
from llmtrain.interchange.base import with_base
from llmtrain.interchange.trained import listed
from llmtrain.models.skeleton import skeleton_of
from llmtrain.nn.model_config import ModelConfig
from llmtrain.objectives.base import Objective
from llmtrain.optim.groups import Penalty
from llmtrain.standard_streams import Say
from llmtrain.train.config import TrainConfig
from llmtrain.train.embeddings import embedding_source
from llmtrain.train.pretrained import Pretrained, StartingWeights, open_weights
from llmtrain.train.resolve import Resolved
from llmtrain.train.resume import Resume
from llmtrain.train.unfreezing import describe, unfreezing_of, with_frozen
from llmtrain.train.weight_record import WeightRecord, record_weights


@dataclass(frozen=True)
class StartingPoint:
    """Where training begins: after the steps of a checkpoint, or at step 0."""

    resume: Resume | None
    evaluation_owed: bool = False
    """Whether the evaluation that the checkpoint still owes has to be made first."""

    @property
    def checkpoint(self) -> Checkpoint | None:
        return None if self.resume is None else self.resume.checkpoint

    @property
    def step(self) -> int:
        return 0 if self.resume is None else self.resume.checkpoint.step


def build_run_engine(
    resolved: Resolved, device: torch.device, objective: Objective, start: StartingPoint, say: Say
) -> tuple[Engine, WeightRecord]:
    """Build the engine with the weights of the checkpoint, of `model=pretrained` or of the seed. All ranks
    call it together."""
    config, pretrained, checkpoint = resolved.config, resolved.pretrained, start.checkpoint
    if checkpoint is not None:
        checkpoint = with_base(checkpoint, None if pretrained is None else pretrained.path)
    check = FiniteCheck()
    starting = None
    if checkpoint is None and pretrained is not None:
        starting = open_starting_weights(pretrained, config.model, say)
    source = None if starting is None else check.watching(starting.source(config.seed))
    if checkpoint is None and config.embeddings.path is not None:
        assert resolved.corpora is not None
        otherwise = seed_source(skeleton_of(config.model), config.seed)
        source = embedding_source(config, resolved.corpora, otherwise, say)
    training = config
    if (unfreezing := unfreezing_of(config)) is not None:
        gc.collect()  # the engine before this one may be part of a cycle
        before = None if checkpoint is None else checkpoint.frozen
        training = with_frozen(config, unfreezing, start.step, before)
        say(describe(training, unfreezing.next_change(start.step) or config.train.steps))
    weights = record_weights(config, pretrained, checkpoint, starting)
    new = () if weights.differences is None else weights.differences["new"]
    penalties = penalties_of(config, new)
    engine = build_engine(training, resolved.layout, device, objective, checkpoint, source, penalties)
    if weights.never_trained and checkpoint is None:
        say(f"warning: these frozen parameters were never trained: {listed(weights.never_trained)}")
    if pretrained is not None:
        refuse_infinite(check, pretrained)
    return engine, weights


def penalties_of(config: TrainConfig, new: Collection[str]) -> dict[str, Penalty]:
    """Return the penalties of the section `transfer` by the names of the parameters. new: those that
    model.path lacks."""
    if not config.transfer.l2_sp and not config.transfer.l2_new:
        return {}
    names = [name for name, _ in skeleton_of(config.model).named_parameters()]
    return config.transfer.penalties(names, new)


def refuse_infinite(check: FiniteCheck, pretrained: Pretrained) -> None:
    """Raise on all ranks if a value that any of them has looked at is not finite."""
    where = f"model.path={pretrained.path}"
    processes.agree(lambda: check.refuse(where))


def open_starting_weights(pretrained: Pretrained, model: ModelConfig, say: Say) -> StartingWeights:
    """Return the weights of `model=pretrained`, and say which are new and which go unused."""
    starting = open_weights(pretrained, model)
    say(f"starting from the weights of {starting.trained.source}, with a fresh optimizer")
    for note in starting.notes():
        say(note)
    return starting
