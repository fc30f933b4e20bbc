"""Open the trackers that a config enables, and send metrics to all of them.

Steps are counted as completed optimizer steps. A resumed run drops or hides metrics that the killed run had
tracked after its checkpoint, so that every step appears once in every tracker.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any, TypeVar

from llmtrain.errors import UserError
from llmtrain.track.base import Metrics, Tracker, WrittenText
from llmtrain.track.config import TrackConfig, WandbConfig

T = TypeVar("T")
logger = logging.getLogger(__name__)

METRICS_FILE = "metrics.jsonl"
PICTURE_FILE = "loss.png"


class Trackers:
    """Several trackers as one. A failing tracker is reported once and does not stop training, unless it
    raises a UserError (full disk).

    earlier: tracker states of the checkpoint that the run resumes from. They are kept for trackers that are
    disabled or fail for a while.
    """

    def __init__(self, earlier: Mapping[str, Any] | None = None) -> None:
        self._earlier = dict(earlier or {})
        self._trackers: dict[str, Tracker] = {}
        self._failed: set[str] = set()

    def open(self, name: str, make: Callable[[], Tracker]) -> None:
        """Add the tracker that `make` returns; skip it if `make` fails."""
        tracker = self._guard(name, make, None)
        if tracker is not None:
            self._trackers[name] = tracker

    def log(self, step: int, metrics: Metrics) -> None:
        for name, tracker in self._trackers.items():
            self._guard(name, partial(tracker.log, step, metrics), None)

    def show(self, step: int, pictures: Mapping[str, bytes]) -> None:
        for name, tracker in self._trackers.items():
            self._guard(name, partial(tracker.show, step, pictures), None)

    def write(self, step: int, texts: Sequence[WrittenText]) -> None:
        for name, tracker in self._trackers.items():
            self._guard(name, partial(tracker.write, step, texts), None)

    def alert(self, title: str, text: str) -> None:
        for name, tracker in self._trackers.items():
            self._guard(name, partial(tracker.alert, title, text), None)

    def keep(self, step: int, checkpoint: Path) -> None:
        for name, tracker in self._trackers.items():
            self._guard(name, partial(tracker.keep, step, checkpoint), None)

    def state(self) -> dict[str, Any]:
        for name, tracker in self._trackers.items():
            self._earlier[name] = self._guard(name, tracker.state, self._earlier.get(name, {}))
        return dict(self._earlier)

    def close(self, failed: bool) -> None:
        for name, tracker in self._trackers.items():
            self._guard(name, partial(tracker.close, failed), None)

    def _guard(self, name: str, call: Callable[[], T], otherwise: T) -> T:
        try:
            return call()
        except UserError:
            raise
        except Exception as error:
            if name not in self._failed:
                self._failed.add(name)
                logger.warning(
                    "track.%s failed, training continues: %s: %s", name, type(error).__name__, error
                )
            return otherwise


def open_trackers(
    config: TrackConfig,
    *,
    run_dir: Path,
    run_name: str,
    resolved_config: dict[str, Any],
    resume_step: int | None,
    state: Mapping[str, Any] | None,
) -> Trackers:
    """Open the trackers that `config` enables, under `run_dir`. Call it on one rank only.

    resume_step, state: step and `Trackers.state()` of the checkpoint that the run resumes from; None for a
    new run, which starts all trackers anew.
    Raise ConfigError if Weights & Biases rejects the settings or the account, TrainingError if the run folder
    is not writable.
    """
    trackers = Trackers(state)
    if config.jsonl is not None:
        trackers.open("jsonl", lambda: _jsonl(run_dir / METRICS_FILE, resume_step))
    if config.tensorboard is not None:
        settings = config.tensorboard
        trackers.open(
            "tensorboard",
            lambda: _tensorboard(settings, run_dir / "tensorboard", resolved_config, resume_step),
        )
    if config.wandb is not None:
        wandb = partial(
            _wandb,
            config.wandb,
            run_dir=run_dir,
            run_name=run_name,
            resolved_config=resolved_config,
            resume_step=resume_step,
            run_id=(state or {}).get("wandb", {}).get("run_id"),
            history=run_dir / METRICS_FILE if config.jsonl is not None else None,
        )
        trackers.open("wandb", wandb)
    if config.picture is not None:
        # After the JSONL tracker, so that its file is complete when this tracker is closed.
        trackers.open("picture", lambda: _picture(run_dir / PICTURE_FILE, run_dir / METRICS_FILE, run_name))
    return trackers


def _jsonl(*arguments: Any) -> Tracker:
    from llmtrain.track.jsonl import JsonlTracker

    return JsonlTracker(*arguments)


def _tensorboard(*arguments: Any) -> Tracker:
    from llmtrain.track.tensorboard import TensorBoardTracker

    return TensorBoardTracker(*arguments)


def _picture(*arguments: Any) -> Tracker:
    from llmtrain.track.picture import PictureTracker

    return PictureTracker(*arguments)


def _wandb(config: WandbConfig, **settings: Any) -> Tracker:
    from llmtrain.track.weights_and_biases import WandbTracker

    return WandbTracker(config, **settings)
