"""Configuration of the trackers. A tracker is enabled if it has a section. Does not import torch."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Literal

from llmtrain.config import MAY_BE_EMPTY, require
from llmtrain.errors import Problem


@dataclass(frozen=True)
class JsonlConfig:
    """Metrics in metrics.jsonl in the run folder, one JSON object per step."""


@dataclass(frozen=True)
class TensorBoardConfig:
    """TensorBoard event files in tensorboard/ in the run folder."""

    flush_seconds: int = 30
    """Maximum seconds until a metric is written to disk."""

    def problems(self) -> Iterator[Problem]:
        yield from require(self.flush_seconds >= 1, "flush_seconds", self.flush_seconds, "1 or more")


@dataclass(frozen=True)
class WandbConfig:
    """A run in Weights & Biases, with the name of this run."""

    project: str = "llmtrain"
    """Project of the run."""
    entity: str | None = None
    """User or team that owns the project; null: the default of the account."""
    mode: Literal["online", "offline", "disabled"] | None = None
    """Upload during the run (online), store in the run folder (offline), or do nothing (disabled). null: the
    value of the environment variable WANDB_MODE, else online."""
    group: str | None = None
    """Group of the run in the user interface; null: none."""
    tags: tuple[str, ...] = ()
    """Tags of the run."""
    notes: str | None = field(default=None, metadata={MAY_BE_EMPTY: True})
    """Description of the run; null: none."""
    artifacts: bool = False
    """Whether each checkpoint becomes a version of an artifact of the run; it is copied first."""


@dataclass(frozen=True)
class PictureConfig:
    """Loss curves in loss.png in the run folder, drawn from metrics.jsonl when training ends."""


@dataclass(frozen=True)
class TrackConfig:
    """Trackers that receive the metrics in addition to the progress line; null: disabled."""

    jsonl: JsonlConfig | None = None
    """metrics.jsonl."""
    tensorboard: TensorBoardConfig | None = None
    """TensorBoard event files."""
    wandb: WandbConfig | None = None
    """Weights & Biases."""
    picture: PictureConfig | None = None
    """loss.png; needs jsonl."""
    alerts: bool = False
    """Whether W&B alerts whoever the account names of restarts, bad steps, rollbacks, hangs and failures."""

    def problems(self) -> Iterator[Problem]:
        is_alone = self.picture is not None and self.jsonl is None
        yield from require(not is_alone, "picture", "{}", "null without jsonl", "give track=[jsonl,picture]")
