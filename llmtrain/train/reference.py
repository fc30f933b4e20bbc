"""Predictions of the model that a run starts from, which a loss is measured against: computed once, before
the first step, and kept in the run folder, so that no second model is held and a resumed run goes on with
the same.

The file is reference-CHECKSUM.safetensors: its name tells whether it has changed. Until it is whole its parts
are kept (reference_parts.py), so that a start after a kill goes on where the last one was.
"""

from __future__ import annotations

import time
from collections.abc import Mapping
from functools import partial
from pathlib import Path

import numpy as np
import torch
import xxhash
from safetensors import SafetensorError, safe_open
from safetensors.numpy import save

from llmtrain.data.datasets.base import Dataset
from llmtrain.distributed import processes, stopping
from llmtrain.engine.base import Engine
from llmtrain.errors import CheckpointError, ConfigError, DataError, Problem
from llmtrain.files import disk_problem, write_atomically
from llmtrain.interchange.additions import without_additions
from llmtrain.interchange.trained import TrainedModel
from llmtrain.objectives.base import HasReference, Objective
from llmtrain.standard_streams import Say
from llmtrain.track.progress import duration
from llmtrain.train.config import TrainConfig
from llmtrain.train.evaluation import evaluate_dataset
from llmtrain.train.reference_parts import ReferenceParts
from llmtrain.train.starting import StartingPoint

PATTERN = "reference-*.safetensors"
_NAMES = {False: "train", True: "validation"}
"""Whether rows are held out → name of their tensor."""
_START = "start"
"""Key of the hash of what the predictions come from."""
_BATCHES = 4
"""Micro-batches of each replica after which a part may be written."""
_INTERRUPTED = (
    "\nllmtrain: stopped on request while it computed the reference; run the same command to go on with it\n"
)


def give_reference(
    objective: Objective,
    engine: Engine,
    datasets: Mapping[bool, Dataset | None],
    config: TrainConfig,
    data_rank: int,
    start: StartingPoint,
    say: Say,
) -> None:
    """Give an objective that needs it the predictions of the starting weights. All ranks call it together,
    before the first step of a start.

    datasets: whether rows are held out → those rows.
    Raise CheckpointError if the run has made steps and its reference is lost.
    """
    if not isinstance(objective, HasReference):
        return
    given = {held_out: dataset for held_out, dataset in datasets.items() if dataset is not None}
    folders = [config.run.dir]
    if start.checkpoint is not None:
        folders.append(start.checkpoint.path.parents[1])
    # Before the first step the same folder may be given other weights.
    key = _key(engine, config) if start.step == 0 else None
    found = processes.from_main(read_reference(folders, given, key) if processes.is_main() else None)
    if found is None and start.step > 0:
        got = f"no {PATTERN} of these data, which the run computed before its first step"
        remedy = "restore the file, or begin another run.dir"
        raise processes.everywhere(CheckpointError(Problem(f"run.dir={config.run.dir}", got, remedy=remedy)))
    if found is None:
        assert key is not None
        say("computing the reference: log-probabilities under the weights that training starts from")
        stopping.request.farewell = _INTERRUPTED
        found = _predictions(engine, given, config, data_rank, key, say)
        predictions, said = found, key
        processes.on_main(lambda: _write(config.run.dir, given, predictions, said))
    objective.references = found


def reference_of(trained: TrainedModel, dataset: Dataset) -> dict[bool, np.ndarray] | None:
    """Return the reference of the rows that a trained model is evaluated on; None: its run has none of
    them."""
    for held_out in _NAMES:
        found = read_reference([trained.source.parents[1]], {held_out: dataset})
        if found is not None:
            return {True: found[held_out]}
    return None


def starting_model(trained: TrainedModel) -> TrainedModel:
    """Return the model that a run started from, whose predictions other rows are measured against: the base
    of one that trained additions. Raise DataError for any other, whose starting weights are gone."""
    try:
        return without_additions(trained)
    except ConfigError:
        allowed = "the rows that the run trained on or validated with, whose reference is in its folder"
        remedy = "leave data and split out; a run with method=lora can be evaluated on any rows"
        raise DataError(Problem("data", "other rows, or another length", allowed, remedy)) from None


def of_rows(found: Mapping[int, np.ndarray], count: int) -> dict[bool, np.ndarray]:
    """Return the predictions of some of `count` rows, by their numbers, as an objective takes them."""
    array = np.full((count, *next(iter(found.values())).shape), np.nan, np.float32)
    for row, values in found.items():
        array[row] = values
    return {True: array}


def read_reference(
    folders: list[Path], datasets: Mapping[bool, Dataset], key: str | None = None
) -> dict[bool, np.ndarray] | None:
    """Return whether rows are held out → their reference, from the first folder that has it whole; None: none
    has. key: a hash of the weights that it has to come from; None: of any."""
    for folder in folders:
        for path in sorted(folder.glob(PATTERN)):
            found = _read(path, datasets, key)
            if found is not None:
                return found
    return None


def _read(path: Path, datasets: Mapping[bool, Dataset], key: str | None) -> dict[bool, np.ndarray] | None:
    try:
        if xxhash.xxh3_128_hexdigest(path.read_bytes()) != path.stem.split("-")[-1]:
            return None
        with safe_open(path, framework="numpy") as file:
            said = file.metadata() or {}
            if key is not None and said.get(_START) != key:
                return None
            found = {}
            for held_out, dataset in datasets.items():
                name = _NAMES[held_out]
                if said.get(name) != dataset.fingerprint:
                    return None
                found[held_out] = file.get_tensor(name)
            return found
    except (OSError, SafetensorError, ValueError):
        return None


def _key(engine: Engine, config: TrainConfig) -> str:
    """Return a hash of what the predictions follow from but for the rows: weights, precision and layout. All
    ranks call it together."""
    digest = xxhash.xxh3_128(f"{config.precision}/{engine.layout}/{engine.device.type}".encode())
    for fragment in engine.fragments():
        values = fragment.view_of(fragment.holder).cpu().contiguous().view(torch.uint8)
        digest.update(f"{fragment.name}/{fragment.start}".encode())
        digest.update(values.numpy().tobytes())
    return xxhash.xxh3_128_hexdigest("".join(processes.gather(digest.hexdigest())).encode())


def _predictions(
    engine: Engine,
    datasets: Mapping[bool, Dataset],
    config: TrainConfig,
    data_rank: int,
    key: str,
    say: Say,
) -> dict[bool, np.ndarray]:
    """Return whether rows are held out → their predictions, fp32: those of earlier starts that were kept, and
    the rest computed. All ranks call it together."""
    parts = ReferenceParts(config.run.dir, key)
    kept = {
        held_out: processes.from_main(
            parts.read(_NAMES[held_out], dataset.fingerprint) if processes.is_main() else None
        )
        for held_out, dataset in datasets.items()
    }
    total, at_start = sum(map(len, datasets.values())), sum(len(a) for a in kept.values() if a is not None)
    done, started = at_start, time.monotonic()
    if at_start:
        say(f"reference: {at_start:,} of {total:,} rows were computed by an earlier start")

    def keep(held_out: bool, first: int, values: np.ndarray, is_last: bool) -> None:
        if not parts.add(_NAMES[held_out], datasets[held_out].fingerprint, first, values, is_last):
            return
        rate = (done - at_start) / max(1e-9, time.monotonic() - started)
        left = duration((total - done) / rate)
        say(f"reference: {done:,} of {total:,} rows, {rate:,.1f} rows/s, eta {left}")

    found = {}
    for held_out, dataset in datasets.items():
        before = kept[held_out]
        blocks = [] if before is None else [before]
        first, size = sum(map(len, blocks)), engine.layout.micro_size * engine.layout.data * _BATCHES
        while first < len(dataset):
            rows = range(first, min(len(dataset), first + size))
            workers = config.data.workers
            totals = evaluate_dataset(engine, dataset, engine.layout, data_rank, workers, None, rows=rows)
            block = np.stack([totals.rows[index] for index in rows]).astype(np.float32)
            blocks.append(block)
            done, first = done + len(rows), rows.stop
            processes.on_main(partial(keep, held_out, rows.start, block, first == len(dataset)))
        found[held_out] = np.concatenate(blocks)
    return found


def _write(
    folder: Path, datasets: Mapping[bool, Dataset], found: Mapping[bool, np.ndarray], key: str
) -> None:
    tensors = {_NAMES[held_out]: array for held_out, array in found.items()}
    said = {_NAMES[held_out]: dataset.fingerprint for held_out, dataset in datasets.items()}
    content = save(tensors, metadata={**said, _START: key})
    try:
        for old in folder.glob(PATTERN):
            old.unlink()
        write_atomically(folder / f"reference-{xxhash.xxh3_128_hexdigest(content)}.safetensors", content)
        ReferenceParts(folder, key).remove()
    except OSError as error:
        raise CheckpointError(disk_problem(error, folder, key="run.dir")) from error
