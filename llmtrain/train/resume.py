"""Which checkpoint a run goes on from, and whether it may."""

from __future__ import annotations

import shutil
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from llmtrain.checkpoint import store
from llmtrain.checkpoint.store import Checkpoint
from llmtrain.config import encode
from llmtrain.errors import CheckpointError, Problem
from llmtrain.parallel import distributed
from llmtrain.train.config import TrainConfig, model_differences

Say = Callable[[str], None]


def find_resume(config: TrainConfig, root: Path, data: Mapping[str, Any], say: Say) -> Checkpoint | None:
    """The checkpoint that the run goes on from; None for a fresh start. The same on every rank.

    Raises CheckpointError when the one to resume from is damaged or belongs to another model, tokenizer
    or optimizer, or when `never` meets a folder with checkpoints.
    """
    resume = config.checkpoint.resume
    held = distributed.from_main(store.list_steps(root))
    if resume == "never":
        if held:
            remedy = "use checkpoint.resume=auto to go on, or another run.dir"
            raise _everywhere(
                Problem("run.dir", f"{root.parent}, which holds {held[-1].name}", "no run", remedy)
            )
        return None
    outside = resume != "auto" and not Path(resume).expanduser().resolve().is_relative_to(
        root.parent.resolve()
    )
    if resume == "auto" or (outside and held):
        checkpoint, rejected = store.newest_good(root)
        for problem in rejected:
            say(f"damaged checkpoint passed over: {problem}")
        if checkpoint is None:
            if rejected:
                remedy = "restore one from elsewhere, or give another run.dir to start anew"
                raise _everywhere(Problem(str(root), f"only damaged checkpoints ({rejected[0]})", "", remedy))
            return None
    else:
        checkpoint = store.find(Path(resume).expanduser())
        if not outside:
            distributed.on_main(lambda: _set_aside_after(root, checkpoint.step, say))
    _check_same_model(config, checkpoint, data, say)
    say(f"resuming from {checkpoint.path} (step {checkpoint.step:,})")
    return checkpoint


def _everywhere(problem: Problem) -> CheckpointError:
    error = CheckpointError(problem)
    error.everywhere = True
    return error


def _set_aside_after(root: Path, step: int, say: Say) -> None:
    """Move checkpoints later than `step` out of the way of a run that goes back to it; none is deleted."""
    for path in store.list_steps(root):
        if path.name > store.step_folder(step):
            aside = root / "superseded" / f"{path.name}-{int(time.time())}"
            aside.parent.mkdir(exist_ok=True)
            shutil.move(path, aside)
            say(f"set aside {path.name} as {aside}")


def _check_same_model(config: TrainConfig, checkpoint: Checkpoint, data: Mapping[str, Any], say: Say) -> None:
    manifest = checkpoint.manifest
    problems = []
    different = model_differences(encode(config.model), manifest["model"])
    if different:
        remedy = "give another run.dir, or the model that the checkpoint has"
        problems.append(Problem(str(checkpoint.path), f"another model ({', '.join(different)})", "", remedy))
    theirs = manifest["data"]
    if theirs["tokenizer_sha256"] != data["tokenizer_sha256"]:
        problems.append(
            Problem(
                "data.path",
                f"data prepared with another tokenizer ({str(data['tokenizer_sha256'])[:12]}…)",
                f"the tokenizer of {checkpoint.path} ({str(theirs['tokenizer_sha256'])[:12]}…)",
                f"prepare it with tokenizer.model={checkpoint.path}/tokenizer.model, or give another run.dir",
            )
        )
    before = manifest["config"]
    if before["optimizer"]["name"] != config.optimizer.name:
        problems.append(
            Problem(
                "optimizer",
                f"{config.optimizer.name!r} over a checkpoint of {before['optimizer']['name']!r}",
                before["optimizer"]["name"],
                "its state cannot be taken over; give another run.dir to start anew",
            )
        )
    if problems:
        error = CheckpointError(problems)
        error.everywhere = True
        raise error
    if theirs["fingerprint"] != data["fingerprint"]:
        say(f"note: the corpus has changed since {checkpoint.path.name}; the order of samples is a new one")
    ours = encode(config)
    for section, key in (("batch", "global_size"), ("batch", "sequence_length"), (None, "seed")):
        was, now = ((c[section] if section else c)[key] for c in (before, ours))
        if was != now:
            name = f"{section}.{key}" if section else key
            say(f"note: {name} was {was}, is {now}; samples come in a new order")
