"""Write checkpoints that are independent of the layout: each rank writes the parts of parameters that it owns
as boxes of the whole parameter, and any box of any parameter can be read.

    step-00000100/
      rank-00000.safetensors   weights and optimizer state: `KIND/NAME@ROW,COLUMN`, (rows, columns) fp32
      rank-00001.safetensors
      tokenizer.model          or tokenizer.bundle.json
      manifest.json            written last: location of each box, sizes, checksums, the run's config

The folder has a temporary name until all of it is on disk, so that a kill at any time leaves earlier
checkpoints intact and no incomplete one. Nothing in it is unpickled.

reader.py reads checkpoints, manifest.py defines the manifest, saver.py saves during training, and
llmtrain/tensor_boxes.py defines boxes.
"""

from __future__ import annotations

import dataclasses
import datetime
import os
import shutil
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import torch

from llmtrain import files
from llmtrain.checkpoint.manifest import FORMAT, MANIFEST, OPTIMIZER, VERSION, WEIGHT, step_folder
from llmtrain.checkpoint.reader import Checkpoint, cover_problem_of
from llmtrain.checkpoint.writer import write_safetensors
from llmtrain.distributed import processes
from llmtrain.engine.base import Engine, optimizer_tensors
from llmtrain.engine.carried import CARRIED, carried_by, share_of
from llmtrain.errors import Problem, TrainingError
from llmtrain.tensor_boxes import Box, Shard
from llmtrain.tokenizers.base import TOKENIZER_FILES

DELETED = ".deleted-"
REPLACED = ".replaced-"


class Part(NamedTuple):
    """One kind of state of one fragment: elements [start, start + len(values)) of the flattened shard."""

    kind: str
    name: str
    shard: Shard
    start: int
    values: torch.Tensor
    """1-D, on any device, of any floating-point dtype."""
    is_constant: bool = False
    """Whether it is frozen: no step changes it."""

    def pieces(self) -> Iterator[tuple[str, Box, torch.Tensor]]:
        """Yield (key in the file, box in the whole parameter, its values (rows, columns)); padding has
        none."""
        for box, place in self.shard.pieces(self.start, self.start + self.values.numel()):
            key = f"{self.kind}/{self.name}@{box.row},{box.column}"
            yield key, box, self.values[place].view(box.rows, box.columns)


@dataclass(frozen=True)
class Share:
    """The state that one rank saves."""

    parts: list[Part]
    counters: dict[str, dict[str, float]]
    """Kind → parameter name → a number that all elements share (Adam's `step`)."""
    scaler: dict[str, float]
    frozen: frozenset[str] = frozenset()
    """Names of the parameters that are not trained."""
    statistics: frozenset[str] = frozenset()
    """Names of the weights that forward passes change, and no optimizer."""


def collect(engine: Engine, left_out: Collection[str] = ()) -> Share:
    """Return this rank's share: views of the engine's memory, which the next step changes.

    left_out: names of frozen weights that the checkpoint's base holds."""
    parts: list[Part] = []
    counters: dict[str, dict[str, float]] = {}
    frozen: set[str] = set()
    statistics: set[str] = set()
    for fragment in engine.fragments():
        place = fragment.name, fragment.shard, fragment.start
        if fragment.trains or fragment.name not in left_out:
            is_constant = not fragment.trains and not fragment.is_statistic
            values = fragment.view_of(fragment.holder)
            # A copy: forward passes of the next step change it, before the step waits for the copier.
            values = values.clone() if fragment.is_statistic else values
            parts.append(Part(WEIGHT, *place, values, is_constant))
        if fragment.is_statistic:
            statistics.add(fragment.name)
            continue
        if not fragment.trains:
            frozen.add(fragment.name)
            continue
        for key, value in optimizer_tensors(engine.optimizer, fragment):
            if isinstance(value, torch.Tensor):
                parts.append(Part(OPTIMIZER + key, *place, value))
            else:
                counters.setdefault(OPTIMIZER + key, {})[fragment.name] = value
    if (states := carried_by(engine.model)) is not None:
        # A copy: the next forward pass changes them.
        shard, values = share_of(states, engine.mesh.coordinates.data, engine.layout.data)
        parts.append(Part(CARRIED, CARRIED, shard, 0, values))
    return Share(parts, counters, engine.scaler_state(), frozenset(frozen), frozenset(statistics))


def begin(root: Path, step: int, makes: bool | None = None) -> Path:
    """Create the temporary folder for the shares of `step` and return its path. Called by all ranks.

    makes: whether this rank creates it; None: rank 0 does, for all."""
    partial = root / f".{step_folder(step)}.partial"

    def make() -> None:
        try:
            root.mkdir(parents=True, exist_ok=True)
            shutil.rmtree(partial, ignore_errors=True)
            partial.mkdir()
        except OSError as error:
            raise _failure(*why(error, partial), partial) from error

    is_maker = processes.is_main() if makes is None else makes
    processes.agree(lambda: make() if is_maker else None)
    return partial


def write_share(
    folder: Path, rank: int, share: Share, go_on: Callable[[], bool] = lambda: True
) -> dict[str, Any]:
    """Write the share of `rank` in fp32 and return its description for the manifest. Calls no collective,
    so a thread may call it. For `go_on` and errors see write_safetensors."""
    pieces = [(part, *piece) for part in share.parts for piece in part.pieces()]
    path = folder / f"rank-{rank:05d}.safetensors"
    values_of = {key: values for _, key, _, values in pieces}
    announced = [(key, torch.empty(box.rows, box.columns, device="meta")) for _, key, box, _ in pieces]
    written = write_safetensors(path, announced, go_on, lambda key: values_of[key].float())
    files.sync_folder(folder)
    return {
        "file": {"file": path.name, "bytes": written.bytes, "xxh3_128": written.checksum},
        "places": [(part.kind, part.name, part.shard.shape, key, tuple(box)) for part, key, box, _ in pieces],
        "counters": share.counters,
        "scaler": share.scaler,
        "frozen": sorted(share.frozen),
        "statistics": sorted(share.statistics),
    }


def hand_in(
    partial: Path, written: dict[str, Any] | None, problem: tuple[str, str] | None
) -> list[dict[str, Any]]:
    """Gather from all ranks the result of write_share, or the problem that a rank met (see `why`). Return all
    results in rank order on rank 0, an empty list on others.

    Raise TrainingError on all ranks if any met a problem; the files written are removed then.
    """
    raise_if_any(processes.gather(problem), partial)
    return [share for share in processes.gather_to_main(written) if share is not None]


def conclude(partial: Path, step: int, problem: tuple[str, str] | None) -> Path:
    """Return the checkpoint's path on all ranks, after rank 0 has assembled it or met a `problem`. Raise
    as `hand_in` does."""
    raise_if_any([processes.from_main(problem)], partial)
    return partial.parent / step_folder(step)


def save(
    root: Path,
    step: int,
    engine: Engine,
    description: Mapping[str, Any],
    tokenizer: Path | None,
    left_out: Collection[str] = (),
) -> Path:
    """Write the engine's state as `root/step-…`. Called by all ranks; returns when it is on disk.

    `description` is JSON for the manifest: model config, run config, tracker state, …; `left_out` is that of
    `collect`. Raise TrainingError
    on all ranks if the disk is full; earlier checkpoints stay.
    """
    partial = begin(root, step)
    written, problem = None, None
    try:
        written = write_share(partial, processes.rank(), collect(engine, left_out))
    except Exception as error:  # hand_in reports it to all ranks
        problem = why(error, partial)
    shares = hand_in(partial, written, problem)
    if processes.is_main():
        try:
            assemble(partial, step, shares, describe(engine, step, description), tokenizer)
        except Exception as error:
            problem = why(error, partial)
    return conclude(partial, step, problem)


def describe(engine: Engine, step: int, description: Mapping[str, Any]) -> dict[str, Any]:
    """Return `description` with further fields of the manifest: time, position in training, layout."""
    return {
        "saved_at": now(),
        "position": {"step": step},
        "layout": dataclasses.asdict(engine.layout),
        **description,
    }


def now() -> str:
    """Return the time as manifests hold it."""
    return datetime.datetime.now(datetime.timezone.utc).isoformat(timespec="seconds")


def assemble(
    partial: Path,
    step: int,
    shares: list[dict[str, Any]],
    description: Mapping[str, Any],
    tokenizer: Path | None,
) -> None:
    """Write the manifest of all ranks' `shares`, in rank order, and rename the folder; call it on rank 0."""
    tensors: dict[str, dict[str, Any]] = {}
    counters: dict[str, dict[str, float]] = {}
    for share in shares:
        for kind, name, shape, key, box in share["places"]:
            entry = tensors.setdefault(kind, {}).setdefault(name, {"shape": list(shape), "boxes": []})
            entry["boxes"].append([share["file"]["file"], key, list(box)])
        for kind, values in share["counters"].items():
            counters.setdefault(kind, {}).update(values)
    for kind, entries in tensors.items():
        for name, entry in entries.items():
            entry["boxes"].sort(key=lambda found: found[2])
            if flaw := cover_problem_of(entry):  # detect it now rather than on resume
                raise ValueError(f"{kind} {name}: {flaw}")
    listed = [share["file"] for share in shares]
    if tokenizer is not None:
        # The tokenizer of a remote corpus has its name in the cache.
        copy = partial / next(name for name in TOKENIZER_FILES if name.endswith(tokenizer.suffix))
        with open(tokenizer, "rb") as source, open(copy, "xb", opener=files.no_follow_opener) as target:
            shutil.copyfileobj(source, target)
        files.sync(copy)
        listed.append({"file": copy.name, "bytes": copy.stat().st_size, "xxh3_128": files.checksum(copy)})
    manifest = {
        "format": FORMAT,
        "version": VERSION,
        "step": step,
        **description,
        "files": listed,
        "frozen": sorted({name for share in shares for name in share["frozen"]}),
        "statistics": sorted({name for share in shares for name in share["statistics"]}),
        "scaler": shares[0]["scaler"],
        "counters": counters,
        "tensors": tensors,
    }
    # On one line: with thousands of ranks it is tens of megabytes, and json indents in Python.
    checked = {**manifest, "checksum": files.checksum_of_json(manifest)}
    files.write_json_atomically(partial / MANIFEST, checked, indent=None)
    settle(partial, step)


def settle(partial: Path, step: int) -> Path:
    """Give a folder with shares and their manifest the name of a checkpoint, and return its path; call it on
    one rank."""
    final = partial.parent / step_folder(step)
    replaced = final.with_name(f"{REPLACED}{final.name}")
    if final.exists():  # the same step was saved before
        shutil.rmtree(replaced, ignore_errors=True)
        os.replace(final, replaced)
    os.replace(partial, final)
    files.sync_folder(final.parent)
    shutil.rmtree(replaced, ignore_errors=True)
    return final


def note_evaluation(path: Path, said: Mapping[str, Any]) -> None:
    """Add what an evaluation after saving gave to a checkpoint; call it on one rank."""
    amend(path, {**said, "evaluation_owed": False})


def amend(path: Path, changes: Mapping[str, Any]) -> None:
    """Replace fields of a checkpoint's manifest, atomically; call it on one rank."""
    manifest = {**Checkpoint.open(path).manifest, **changes}
    manifest["checksum"] = files.checksum_of_json(manifest)
    files.write_json_atomically(path / MANIFEST, manifest, indent=None)


def remove(path: Path) -> None:
    """Delete a checkpoint. If killed midway, no part of it keeps its name; `tidy` removes the rest."""
    doomed = path.with_name(f"{DELETED}{path.name}")
    shutil.rmtree(doomed, ignore_errors=True)
    os.replace(path, doomed)
    shutil.rmtree(doomed, ignore_errors=True)


def tidy(root: Path) -> None:
    """Remove what killed processes left half written, deleted or replaced. Only the owner of the run
    folder may call it."""
    for path in root.glob(f"{REPLACED}*"):
        final = root / path.name.removeprefix(REPLACED)
        if not final.exists():
            os.replace(path, final)
    for pattern in (f"{DELETED}*", f"{REPLACED}*", ".*.partial"):
        for path in root.glob(pattern):
            shutil.rmtree(path, ignore_errors=True)


def why(error: Exception, partial: Path) -> tuple[str, str]:
    """Return what kept this rank from writing, and what to do about it, to be sent to all ranks."""
    share = f"while writing rank {processes.rank()}'s share"
    if files.is_disk_full(error):
        folder = next(folder for folder in partial.parents if folder.exists())
        free = shutil.disk_usage(folder).free
        return f"a full disk ({free / 2**20:.0f} MiB free) {share}", "make room, then "
    return f"{type(error).__name__} {share}: {error}", ""


def raise_if_any(reasons: Iterable[tuple[str, str] | None], partial: Path) -> None:
    """Raise TrainingError on all ranks with the first rank's reason, if any; remove the files written."""
    for reason in reasons:
        if reason is not None:
            raise processes.everywhere(_failure(*reason, partial))


def _failure(got: str, first: str, partial: Path) -> TrainingError:
    if processes.is_main():
        shutil.rmtree(partial, ignore_errors=True)
    kept = any(partial.parent.glob("step-*"))
    remedy = "earlier checkpoints are whole: " if kept else "no checkpoint was written: "
    return TrainingError(
        Problem(str(partial.parent), got, remedy=f"{remedy}{first}run the same command to resume")
    )
