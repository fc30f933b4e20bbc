"""The run folder: its lock, and the facts that make a run reproducible.

RUN/
  config.yaml        the resolved configuration
  environment.json   versions, machine and command line of the latest start
  git.json           commit of the working folder; git.diff: its uncommitted changes
  data.json          fingerprint and size of the training data
  metrics.jsonl      one object a step
  events.jsonl       starts, checkpoints, bad steps, restarts, and how each start ended
  logs/              output of ranks under launch/torchrun.sh, and reports of hangs
  features.json      with method=features: the strengths of regularization that were tried, with their losses
  words/             of word vectors: the vocabulary, and the text as rows of it
  loss.png           with track=[jsonl,picture]: the loss curves
  profile/           with profile.steps: traces of torch's profiler
  checkpoints/       step-00000500/ …; with checkpoint.remote, .remote/: the manifests that are there
"""

from __future__ import annotations

import os
import platform
from collections.abc import Mapping
from importlib import metadata
from pathlib import Path
from typing import Any

import yaml

from llmtrain import files
from llmtrain.distributed import launcher
from llmtrain.errors import CheckpointError, Problem, TrainingError
from llmtrain.git import cut, git_state
from llmtrain.track.events import note_event
from llmtrain.train.folder_lock import FolderLock
from llmtrain.urls import without_credentials

PACKAGES = (
    *("llmtrain", "torch", "deepspeed", "fairscale", "webdataset", "sentencepiece", "numpy"),
    *("safetensors", "wandb", "hydra-core"),
)


class RunFolder:
    """An exclusive lock on a run folder, until close() or the end of the process, however it ends."""

    def __init__(self, path: Path) -> None:
        """Create the folder and lock it. Raise CheckpointError when it cannot be written or another process
        uses it. On a file system without locks the folder is used unlocked."""
        self.path = path
        try:
            path.mkdir(parents=True, exist_ok=True)
            self._refuse_links()
            self._lock = FolderLock(path)
        except OSError as error:
            raise CheckpointError(files.disk_problem(error, path, key="run.dir")) from error

    def _refuse_links(self) -> None:
        """Raise CheckpointError for links out of the folder: whoever made it chose their targets."""
        found = files.outward_links(self.path)
        if self.checkpoints.is_dir():
            found += files.outward_links(self.checkpoints)
        if found:
            got = f"a link that leads out of it: {found[0].relative_to(self.path)} → {os.readlink(found[0])}"
            remedy = "remove the link, or put what it leads to in its place"
            raise CheckpointError(
                Problem(f"run.dir={self.path}", got, "files and folders of its own", remedy)
            )

    @property
    def checkpoints(self) -> Path:
        return self.path / "checkpoints"

    def note(self, kind: str, step: int | None = None, **facts: Any) -> None:
        """Record an event of the run; see track/events.py."""
        note_event(self.path, kind, step, **facts)

    def close(self) -> None:
        self._lock.close()

    def describe(self, config: Mapping[str, Any], data: Mapping[str, Any], facts: Mapping[str, Any]) -> None:
        """Write config.yaml, environment.json, git.json and data.json; environment.json includes `facts`.

        Raise TrainingError when the disk is full.
        """
        try:
            files.write_atomically(self.path / "config.yaml", yaml.safe_dump(dict(config), sort_keys=False))
            files.write_json_atomically(self.path / "environment.json", {**environment(), **facts})
            files.write_json_atomically(self.path / "data.json", dict(data))
            git, diff = git_state()
            files.write_json_atomically(self.path / "git.json", git)
            if diff:
                files.write_atomically(self.path / "git.diff", cut(diff))
            else:
                (self.path / "git.diff").unlink(missing_ok=True)
        except OSError as error:
            raise TrainingError(files.disk_problem(error, Path(error.filename or self.path))) from error


def environment() -> dict[str, Any]:
    """Return versions, machine and command line, as JSON."""
    versions: dict[str, str | None] = {}
    for name in PACKAGES:
        try:
            versions[name] = metadata.version(name)
        except metadata.PackageNotFoundError:
            versions[name] = None
    variables = {
        key: value
        for key, value in os.environ.items()
        if key.startswith(("SLURM_JOB", "OMP_", "NCCL_", "GLOO_", "CUDA_VISIBLE"))
        or key in ("MASTER_ADDR", "WORLD_SIZE")
    }
    return {
        "command": [without_credentials(word) for word in launcher.command()],
        "folder": os.getcwd(),
        "python": platform.python_version(),
        "platform": platform.platform(),
        "host": platform.node(),
        "processors": os.cpu_count(),
        "packages": versions,
        "variables": variables,
    }
