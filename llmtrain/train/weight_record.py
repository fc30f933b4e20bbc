"""What the checkpoints of a run record about its initial weights."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from llmtrain.checkpoint.reader import Checkpoint
from llmtrain.config import encode
from llmtrain.models.registry import skeleton_of
from llmtrain.optim.freezing import frozen_names
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
        return WeightRecord(never_trained, manifest.get("starting"), manifest.get("origin"))
    differences = None
    if starting is not None:
        differences = {"new": list(starting.new), "unused": list(starting.unused)}
    origin = None if pretrained is None else encode(pretrained.origin)
    return WeightRecord(sorted(_never_trained(config, starting)), differences, origin)


def _never_trained(config: TrainConfig, starting: StartingWeights | None) -> frozenset[str]:
    patterns = config.train.freeze
    if not patterns:
        return frozenset()
    if starting is not None:
        return frozen_names(starting.untrained, patterns)
    return frozen_names([name for name, _ in skeleton_of(config.model).named_parameters()], patterns)
