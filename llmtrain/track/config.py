"""What describes the trackers, free of torch. A tracker that has a section is on."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Literal

from llmtrain.config import MAY_BE_EMPTY, require
from llmtrain.errors import Problem


@dataclass(frozen=True)
class JsonlConfig:
    """metrics.jsonl in the run folder."""


@dataclass(frozen=True)
class TensorBoardConfig:
    """Event files in the run folder's tensorboard/."""

    flush_seconds: int = 30
    """Longest time that a metric waits in memory."""

    def problems(self) -> Iterator[Problem]:
        yield from require(self.flush_seconds >= 1, "flush_seconds", self.flush_seconds, "1 or more")


@dataclass(frozen=True)
class WandbConfig:
    """A Weights & Biases run, named as the run is."""

    project: str = "llmtrain"
    """Project that the run belongs to."""
    entity: str | None = None
    """User or team; null: the account's default."""
    mode: Literal["online", "offline", "disabled"] | None = None
    """Where the run is logged; null: what WANDB_MODE says, else online."""
    group: str | None = None
    """Group of runs that it is shown with; null: none."""
    tags: tuple[str, ...] = ()
    """Tags of the run."""
    notes: str | None = field(default=None, metadata={MAY_BE_EMPTY: True})
    """A description of the run; null: none."""


@dataclass(frozen=True)
class PictureConfig:
    """loss.png in the run folder: the loss curves, drawn of metrics.jsonl when training ends."""


@dataclass(frozen=True)
class TrackConfig:
    """Where metrics go, besides the progress line; any number of trackers, none included."""

    jsonl: JsonlConfig | None = None
    tensorboard: TensorBoardConfig | None = None
    wandb: WandbConfig | None = None
    picture: PictureConfig | None = None

    def problems(self) -> Iterator[Problem]:
        is_alone = self.picture is not None and self.jsonl is None
        yield from require(not is_alone, "picture", "{}", "null without jsonl", "give track=[jsonl,picture]")
