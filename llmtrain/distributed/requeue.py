"""Decide whether a Slurm job is put back into the queue. launch/slurm.sbatch calls it, without torch:

    python -m llmtrain.distributed.requeue begin    OVERRIDES…    counts this start of the job
    python -m llmtrain.distributed.requeue end=CODE OVERRIDES…    exit code 0: requeue the job

Both print the reason against a start or a requeue, and end with 1 then. LOG_DIR keeps the count between the
starts of a job, MAX_STARTS bounds the starts without a checkpoint of a new step.
"""

from __future__ import annotations

import os
import platform
import sys
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path

from llmtrain.distributed.elastic import composed_folders
from llmtrain.distributed.folders import log_folder
from llmtrain.distributed.restarts import newest_step
from llmtrain.errors import EXIT_CODE, ConfigError, Problem, UserError
from llmtrain.files import write_json_atomically
from llmtrain.reading import SETTINGS_BYTES, read_decoded

MAX_STARTS = 3
STARTS = "starts.json"
CONFIG = "config.yaml"
"""A file that every run folder contains from its first start on."""


@dataclass(frozen=True)
class Starts:
    """The starts of a job since the newest step."""

    step: int = 0
    """Step of the newest checkpoint at the last start."""
    starts: int = 0
    """Starts of the job from that step, the last one included."""
    job: str = ""
    """Number of the job, which a requeue keeps."""
    saved: int = 0
    """Step of the newest checkpoint when the last start ended; 0 if it could not tell."""


def begin(folder: Path, run: Path, most: int, job: str = "") -> str:
    """Count a start of the job. Return "", or why it must not start once more: a start that was cut down, as
    by a node that failed, told nothing at its end.

    folder: where the count is kept; run: the run folder; job: whose starts count. Raise ConfigError if the
    run folder of the starts before is not here: the job would begin anew on each node that it comes to.
    """
    before = _read(folder)
    if before.job != job:  # submitted anew, perhaps after what failed was mended
        before = Starts()
    step = newest_step(run)
    if before.saved and not step and not (run / CONFIG).exists():
        got = f"{run}, in which {platform.node()} has no run, while this job saved step {before.saved:,}"
        allowed = "with REQUEUE=1, a folder that all nodes of the cluster share, or checkpoint.remote"
        raise ConfigError(Problem("run.dir", got, allowed, "put it on a shared file system, and submit anew"))
    starts = before.starts + 1 if step <= before.step and before.starts else 1
    folder.mkdir(parents=True, exist_ok=True)
    write_json_atomically(folder / STARTS, asdict(Starts(step, starts, job)))
    return _too_many(starts - 1, step) if starts > most else ""


def end(code: int, folder: Path, run: Path, most: int, has_copy: bool = False) -> str:
    """Return why a job that ended with `code` is not put back into the queue, or "".

    has_copy: whether another node can fetch the run from elsewhere (checkpoint.remote).
    """
    if code == 0:
        return "all steps are done"
    if code == EXIT_CODE:
        return f"exit code {code} is a mistake in its settings, which another start would repeat"
    found = _read(folder)
    step = newest_step(run)
    folder.mkdir(parents=True, exist_ok=True)
    write_json_atomically(folder / STARTS, asdict(replace(found, saved=0 if has_copy else step)))
    return "" if step > found.step or found.starts < most else _too_many(found.starts, step)


def _too_many(starts: int, step: int) -> str:
    return f"{starts} starts of the job saved no step beyond {step:,} (MAX_STARTS)"


def _read(folder: Path) -> Starts:
    path = folder / STARTS
    if not path.exists():
        return Starts()
    return read_decoded(Starts, path, SETTINGS_BYTES, ConfigError, "what slurm.sbatch wrote", "remove it")


def most_starts(environment: Mapping[str, str]) -> int:
    """Return MAX_STARTS. Raise ConfigError if it is not a positive integer."""
    text = environment.get("MAX_STARTS", "").strip() or str(MAX_STARTS)
    if not text.isdecimal() or int(text) < 1:
        raise ConfigError(Problem("MAX_STARTS", repr(text), "1 or more", "correct this environment variable"))
    return int(text)


def main(arguments: Sequence[str], environment: Mapping[str, str]) -> int:
    """Answer the script: 0 to go on, 1 not to, 2 for a mistake."""
    what, *overrides = arguments
    try:
        most = most_starts(environment)
        folder, (run, _, has_copy) = log_folder(environment, overrides), composed_folders(overrides)
        if what == "begin":
            reason = begin(folder, run, most, environment.get("SLURM_JOB_ID", ""))
        else:
            reason = end(int(what.removeprefix("end=")), folder, run, most, has_copy)
    except UserError as error:
        print(error, file=sys.stderr)
        return EXIT_CODE
    if reason:
        print(f"llmtrain: not {'started' if what == 'begin' else 'requeued'}: {reason}", file=sys.stderr)
    return int(bool(reason))


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:], os.environ))
