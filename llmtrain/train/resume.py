"""Find the checkpoint that a run resumes from, and check that it fits."""

from __future__ import annotations

from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, NamedTuple

from llmtrain import files
from llmtrain.checkpoint import retention, store
from llmtrain.checkpoint.memory import MemoryTier
from llmtrain.checkpoint.reader import Checkpoint
from llmtrain.config import decode, encode
from llmtrain.distributed import processes
from llmtrain.errors import CheckpointError, ConfigError, Problem, UserError
from llmtrain.files import expand_home
from llmtrain.models.registry import family_of
from llmtrain.objectives.reading import other_tokenizer
from llmtrain.optim.freezing import KEY, frozen_names
from llmtrain.reading import SETTINGS_BYTES, read_decoded
from llmtrain.standard_streams import Say
from llmtrain.train.changes import changed_settings
from llmtrain.train.config import TrainConfig, model_differences, recorded

NAMES_SHOWN = 4
"""Most names of parameters in a message."""
WENT_BACK = "went_back.json"
"""File in checkpoints/: the checkpoint that the run was last sent back to."""


@dataclass(frozen=True)
class _WentBack:
    to: str


@dataclass(frozen=True)
class Resume:
    """The checkpoint that a run resumes from."""

    checkpoint: Checkpoint
    is_own: bool
    """Whether the checkpoint is of this run; otherwise the run begins as a fork of another."""

    @property
    def timeline(self) -> list[dict[str, Any]] | None:
        """How the run drew its samples until then; None in old checkpoints, which did not record it."""
        return self.checkpoint.manifest.get("timeline")

    @property
    def evaluation_owed(self) -> bool:
        """Whether the run was stopped where an evaluation was due, before it was made."""
        return self.is_own and self.checkpoint.manifest.get("evaluation_owed", False)

    def note_evaluation(self, said: Mapping[str, Any]) -> None:
        """Record the result of the owed evaluation; all ranks call it."""
        processes.on_main(lambda: store.note_evaluation(self.checkpoint.path, said))

    @property
    def spikes(self) -> Mapping[str, Any] | None:
        """The recorded state of the detection of bad steps; None of a fork, and of a run without
        detection."""
        return self.checkpoint.manifest.get("spikes") if self.is_own else None

    @property
    def evaluations(self) -> Mapping[str, Any] | None:
        """The run's record of its evaluations until then; None of a fork, and in old checkpoints."""
        return self.checkpoint.manifest.get("evaluations") if self.is_own else None


def find_resume(
    config: TrainConfig, data: Mapping[str, Any], say: Say, memory: MemoryTier | None = None
) -> Resume | None:
    """Return the checkpoint that the run resumes from, the same on every rank; None for a fresh start.

    memory: where ranks that were started anew look first.
    Raise CheckpointError when the one to resume from is damaged or belongs to another model, tokenizer
    or optimizer, or when `never` meets a folder with checkpoints. No file is moved before the checks.
    """
    found = locate(config.run.dir / "checkpoints", config.checkpoint.resume, say, memory)
    if found is None:
        return None
    checkpoint, is_own, named = found.checkpoint, found.is_own, found.named
    if checkpoint.is_imported:
        where = "checkpoint.resume" if named is not None else "run.dir"
        got = f"{named or config.run.dir}, weights without an optimizer's state"
        remedy = f"give model=pretrained model.path={named or config.run.dir}"
        remedy += "" if named is not None else " and another run.dir"
        raise _refusal(Problem(where, got, "a run, or one of its checkpoints", remedy))
    _check_same_model(config, checkpoint, data)
    go_on(config.run.dir / "checkpoints", found, say)
    for change in changed_settings(checkpoint.manifest["config"], recorded(config)):
        say(f"note: {change}")
    return Resume(checkpoint, is_own)


class Located(NamedTuple):
    """A checkpoint to resume from, before it is checked that it fits."""

    checkpoint: Checkpoint
    is_own: bool
    """Whether it is of this run."""
    named: Path | None
    """The checkpoint that the user named."""
    in_memory: bool = False
    """Whether it is a copy in memory, which an earlier attempt of this job made."""


def locate(root: Path, resume: str, say: Say, memory: MemoryTier | None = None) -> Located | None:
    """Return the checkpoint that a run whose checkpoints are in `root` resumes from, the same on every rank;
    None for a fresh start.

    resume: that of CheckpointConfig. Raise CheckpointError as find_resume does."""
    processes.on_main(lambda: store.tidy(root))
    held = processes.from_main(retention.list_steps(root))
    if memory is not None:
        copy = memory.newest(int(held[-1].name.split("-")[1]) if held else 0)
        if copy is not None:  # as new as all that is on disk, of which nothing is read
            return Located(copy, is_own=True, named=None, in_memory=True)
    if resume == "never":
        if held:
            remedy = "use checkpoint.resume=auto to go on, or another run.dir"
            raise _refusal(
                Problem("run.dir", f"{root.parent}, which holds {held[-1].name}", "no run", remedy)
            )
        return None
    named = None if resume == "auto" else expand_home(resume).resolve()
    is_own = named is None or named.is_relative_to(root.parent.resolve())
    went_back = named is not None and processes.from_main(_went_back_to(root) == str(named))
    if named is not None and (went_back or (held and not is_own)):
        why = "the run went back to it before" if is_own else "it has checkpoints of its own"
        say(f"checkpoint.resume={resume}: ignored, {root.parent} resumes from its newest checkpoint ({why})")
        named, is_own = None, True
    if named is not None:
        return Located(retention.find(named, say), is_own, named)
    newest, rejected = retention.newest_good(root, say)
    if newest is None and rejected:
        remedy = "restore one from elsewhere, or give another run.dir to start anew"
        raise _refusal(Problem(str(root), f"only damaged checkpoints ({rejected[0]})", "", remedy))
    return None if newest is None else Located(newest, is_own, None)


def go_on(root: Path, found: Located, say: Say) -> None:
    """Set aside what the run saved after its checkpoint, which fits, and say that it resumes from there."""
    if found.is_own:
        processes.on_main(lambda: _go_back(root, found.checkpoint.step, found.named, say))
    where = "the copies in memory" if found.in_memory else found.checkpoint.path
    say(f"resuming from {where} (step {found.checkpoint.step:,})")


def _went_back_to(root: Path) -> str | None:
    """Return the checkpoint that this run was last sent back to by name."""
    path = root / WENT_BACK
    if not path.exists():
        return None
    allowed, remedy = "what llmtrain train wrote", "remove it"
    return read_decoded(_WentBack, path, SETTINGS_BYTES, CheckpointError, allowed, remedy).to


def _go_back(root: Path, step: int, named: Path | None, say: Say) -> None:
    retention.set_aside_after(root, step, say)
    if named is not None:
        # After a kill or a requeue, the same command must continue, not go back again.
        files.write_json_atomically(root / WENT_BACK, {"to": str(named)})


def _refusal(problem: Problem) -> UserError:
    return processes.everywhere(CheckpointError(problem))


def _with_defaults(config: TrainConfig, model: Mapping[str, Any]) -> Mapping[str, Any]:
    """Return an encoded model with the keys that were added since it was written."""
    if model["family"] != config.model.family:
        return model
    try:
        return encode(decode(family_of(config.model).config, model))
    except ConfigError:  # keys that were removed since are differences
        return model


def _check_same_model(config: TrainConfig, checkpoint: Checkpoint, data: Mapping[str, Any]) -> None:
    checkpoint.require("model", "data", "config")
    manifest = checkpoint.manifest
    problems = []
    different = model_differences(encode(config.model), _with_defaults(config, manifest["model"]))
    if different:
        remedy = "give another run.dir, or the model that the checkpoint has"
        problems.append(Problem(str(checkpoint.path), f"another model ({', '.join(different)})", "", remedy))
    theirs = manifest["data"]
    if theirs.get("tokenizer_sha256") != data["tokenizer_sha256"]:
        ours, own = str(data["tokenizer_sha256"]), str(theirs.get("tokenizer_sha256"))
        where = str(checkpoint.path)
        found = other_tokenizer(config.data, ours, own, where, checkpoint.tokenizer)
        problems.append(replace(found, remedy=f"{found.remedy}, or give another run.dir"))
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
    problems += _without_start(config, checkpoint)
    problems += _other_frozen(config.train.freeze, checkpoint, may_thaw=config.method == "gradual")
    if problems:
        raise processes.everywhere(CheckpointError(problems))


def _without_start(config: TrainConfig, checkpoint: Checkpoint) -> Iterator[Problem]:
    """Yield a problem if the run holds weights near values that the checkpoint does not have."""
    before = checkpoint.manifest["config"].get("transfer", {}).get("l2_sp", 0.0)
    if config.transfer.l2_sp and not before:
        got = f"{config.transfer.l2_sp:g} over a checkpoint without the values that its weights started from"
        yield Problem("transfer.l2_sp", got, "0", "give another run.dir to start anew")


def check_same_validation(config: TrainConfig, checkpoint: Checkpoint, data: Mapping[str, Any]) -> None:
    """Raise CheckpointError, alike on all ranks, if a table's validation split is not the checkpoint's."""
    theirs = checkpoint.manifest["data"].get("validation")
    if None in (theirs, data["validation"]) or theirs == data["validation"]:
        return
    key = f"data.{config.data.held_out_key}"
    got = f"rows to evaluate that have changed since step {checkpoint.step:,} of {config.run.dir}"
    remedy = f"restore them, or go on in another run.dir with model.path={checkpoint.path}"
    raise _refusal(Problem(key, got, "the rows that the run's figures are of", remedy))


def _other_frozen(
    patterns: Sequence[str], checkpoint: Checkpoint, *, may_thaw: bool = False
) -> Iterator[Problem]:
    """Yield a problem if other parameters train than before: new ones would have no optimizer state.

    may_thaw: more may train than before, whose optimizer state begins with them.
    """
    names = checkpoint.weight_names - checkpoint.statistics
    ours, theirs = frozen_names(names, patterns), checkpoint.frozen
    if ours == theirs or (may_thaw and ours <= theirs):
        return
    changes = {"frozen that trained": ours - theirs, "trained that were frozen": theirs - ours}
    yield Problem(
        KEY,
        "; ".join(f"{change}: {_some(names)}" for change, names in changes.items() if names),
        f"those of {checkpoint.path}",
        f"leave {KEY} as it was, or start another run.dir with model=pretrained model.path={checkpoint.path}",
    )


def _some(names: Collection[str]) -> str:
    listed = sorted(names)
    more = f" and {len(listed) - NAMES_SHOWN:,} more" if len(listed) > NAMES_SHOWN else ""
    return ", ".join(listed[:NAMES_SHOWN]) + more
