"""A process that logs to JSONL and to W&B, as a run does: python -m tests.support.tracked_run ARGUMENTS

ARGUMENTS: JSON of [run folder, step to resume from, state of the trackers, last step, seconds before kill];
null for none.
"""

from __future__ import annotations

import json
import os
import signal
import sys
import time
from pathlib import Path
from typing import Any

from llmtrain.track.config import JsonlConfig, TrackConfig, WandbConfig
from llmtrain.track.trackers import open_trackers

PICTURED = 12
"""A run with this last step leaves pictures."""


def main(
    run_dir: str, resume_step: int | None, state: Any, last_step: int, seconds_before_kill: float | None
) -> None:
    trackers = open_trackers(
        TrackConfig(jsonl=JsonlConfig(), wandb=WandbConfig(project="test", tags=("a", "b"))),
        run_dir=Path(run_dir),
        run_name="the-run",
        resolved_config={"seed": 1, "model": {"hidden_size": 8}},
        resume_step=resume_step,
        state=state,
    )
    for step in range((resume_step or 0) + 1, last_step + 1):
        trackers.log(step, {"loss": float("nan") if step == 2 else 1.0 / step})
        if step % 2 == 0:
            trackers.log(step, {"validation_loss": 10.0 * step})
    if last_step == PICTURED:
        import numpy as np

        from llmtrain.scoring.classification import class_report
        from llmtrain.scoring.pictures import draw

        report = class_report(np.eye(2)[[0, 1, 1]], np.array([0, 1, 0]), "ab")
        trackers.show(last_step, draw(report, "title"))
    print(json.dumps(trackers.state()), flush=True)
    if seconds_before_kill is not None:
        time.sleep(seconds_before_kill)
        os.kill(os.getpid(), signal.SIGKILL)
    trackers.close(failed=False)


if __name__ == "__main__":
    main(*json.loads(sys.argv[1]))
