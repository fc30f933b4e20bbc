"""What the checkpoints of a run record about its initial weights."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from llmtrain.checkpoint.manifest import Base
from llmtrain.checkpoint.reader import Checkpoint
from llmtrain.config import encode
from llmtrain.distributed import processes
from llmtrain.interchange.base import base_of, record_of
from llmtrain.models.skeleton import skeleton_of
from llmtrain.optim.freezing import frozen_names
from llmtrain.train.adaptation import trains_beside
from llmtrain.train.config import TrainConfig
from llmtrain.train.pretrained import Pretrained, StartingWeights


@dataclass(frozen=True)
class WeightRecord:
    """Where the weights of a run began."""

    never_trained: Sequence[str]
    """Names of the parameters that are frozen at values that no training has changed."""
    differences: Mapping[str, Sequence[str]] | None
    """Names of the "new" and the "unused" parameters of a run that started from a folder; else None."""
    origin: Any
    """Settings of the Hugging Face folder that the weights came from, as JSON; else None."""
    base: Base | None = None
    """The folder of the weights that the run's checkpoints leave out; None: they hold all."""
    left_out: frozenset[str] = frozenset()
    """Names of these weights."""


def record_weights(
    config: TrainConfig,
    pretrained: Pretrained | None,
    checkpoint: Checkpoint | None,
    starting: StartingWeights | None,
) -> WeightRecord:
    """Return what `checkpoint` recorded; at step 0, where it is None, what follows from the settings."""
    if checkpoint is not None:
        manifest = checkpoint.manifest
        never_trained = sorted(manifest.get("fresh", ()))
        starting_differences, origin = manifest.get("starting"), manifest.get("origin")
        base, left_out = base_of(checkpoint), checkpoint.left_out
        return WeightRecord(never_trained, starting_differences, origin, base, left_out)
    differences = None
    if starting is not None:
        differences = {"new": list(starting.new), "unused": list(starting.unused)}
    origin = None if pretrained is None else encode(pretrained.origin)
    never_trained = sorted(_never_trained(config, starting))
    if starting is None or not trains_beside(config):
        return WeightRecord(never_trained, differences, origin)
    return WeightRecord(never_trained, differences, origin, *_base(config, starting))


def _base(config: TrainConfig, starting: StartingWeights) -> tuple[Base | None, frozenset[str]]:
    """Return the folder of the weights that no step changes, and their names."""
    trained = starting.trained
    names = [name for name, _ in skeleton_of(config.model).named_parameters()]
    frozen = (
        frozen_names(names, config.train.freeze)
        - starting.new.keys()
        - starting.renamed.keys()
        - starting.grown.keys()
    )
    if trained.base is not None:  # it left weights out itself
        return trained.base, frozen & trained.left_out
    root = config.run.dir / "checkpoints"
    base = processes.agree(lambda: record_of(trained.source, root) if processes.is_main() else None)
    return processes.from_main(base), frozen


def _never_trained(config: TrainConfig, starting: StartingWeights | None) -> frozenset[str]:
    patterns = config.train.freeze
    if not patterns:
        return frozenset()
    if starting is not None:
        return frozen_names(starting.untrained, patterns)
    return frozen_names([name for name, _ in skeleton_of(config.model).named_parameters()], patterns)
