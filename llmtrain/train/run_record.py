"""The record of one start of a run: its run folder, trackers, events and lines of progress."""

from __future__ import annotations

import platform
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from llmtrain.checkpoint.reader import Checkpoint
from llmtrain.distributed import launcher, processes
from llmtrain.standard_streams import print_note
from llmtrain.track.alerts import alert_of, alert_of_restart
from llmtrain.track.events import EVENTS, read_events
from llmtrain.track.progress import Progress
from llmtrain.track.trackers import Trackers, open_trackers
from llmtrain.train.config import TrainConfig, recorded
from llmtrain.train.run_folder import RunFolder
from llmtrain.urls import without_credentials

LONGEST_REASON = 500


class RunRecord:
    """The record of one start. Ranks other than 0 hold no folder and no trackers, and say nothing."""

    def __init__(self, config: TrainConfig) -> None:
        self._config = config
        self._folder: RunFolder | None = None
        self.trackers: Trackers | None = None
        self.progress: Progress | None = None

    def hold_folder(self) -> None:
        """Lock the run folder. Raise CheckpointError when another process holds it."""
        self._folder = RunFolder(self._config.run.dir)

    def describe(self, data: Mapping[str, Any], facts: Mapping[str, Any]) -> None:
        """Write the files that make the run reproducible."""
        assert self._folder is not None
        self._folder.describe(recorded(self._config), data, facts)

    def begin(self, step: int, continued: Checkpoint | None) -> None:
        """Open the trackers and the progress report of a start from `step` on, and note the start.

        continued: the checkpoint of this run that it resumes from; None for a fresh run and for a fork of
            another run, which has tracks of its own.
        """
        config = self._config
        self.trackers = open_trackers(
            config.track,
            run_dir=config.run.dir,
            run_name=config.run.name,
            resolved_config=recorded(config),
            resume_step=continued.step if continued is not None else None,
            state=continued.manifest.get("trackers") if continued is not None else None,
        )
        alerts = config.track.alerts and step > 0
        before = read_events(config.run.dir / EVENTS) if alerts else []
        self.note("start", step, host=platform.node(), processes=processes.world_size())
        if alerts:
            self.trackers.alert(*alert_of_restart(config.run.name, step, before))
        every = 1 if sys.stderr.isatty() else config.train.log_every
        self.progress = Progress(config.train.steps, start_step=step, every=every)

    def say(self, text: str) -> None:
        """Print a line on rank 0, above the progress line where there is one."""
        if launcher.rank() == 0:
            if self.progress is not None:
                self.progress.message(text)
            else:
                print_note(text)

    def note(self, kind: str, step: int | None = None, **facts: Any) -> None:
        """Append an event to the run folder, on rank 0, and send alerts of it if they are configured."""
        if self._folder is None:
            return
        self._folder.note(kind, step, **facts)
        if self._config.track.alerts and self.trackers is not None:
            alert = alert_of(self._config.run.name, kind, step, facts)
            if alert is not None:
                self.trackers.alert(*alert)

    def keep(self, step: int, checkpoint: Path) -> None:
        """Give a checkpoint to the trackers that keep them."""
        if self.trackers is not None:
            self.trackers.keep(step, checkpoint)

    def close(self, failed: bool) -> None:
        """Release the run folder; `failed` is how trackers mark the run."""
        if failed:
            facts: dict[str, Any] = _reason()
            self.note("fail", **facts)
        if self.progress is not None:
            self.progress.close()
        if self.trackers is not None:
            self.trackers.close(failed)
        if self._folder is not None:
            self._folder.close()


def _reason() -> dict[str, str]:
    """Return the message of the exception that is being handled, as facts of an event."""
    error = sys.exc_info()[1]
    if error is None:
        return {}
    return {"why": without_credentials(str(error) or type(error).__name__)[:LONGEST_REASON]}
