"""Predictions of the model that a run starts from, which a loss is measured against: computed once, before
the first step, and kept in the run folder, so that no second model is held and a resumed run goes on with
the same.

The file is reference-CHECKSUM.safetensors: its name tells whether it has changed.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

import numpy as np
import xxhash
from safetensors import SafetensorError, safe_open
from safetensors.numpy import save

from llmtrain.data.datasets.base import Dataset
from llmtrain.distributed import processes
from llmtrain.engine.base import Engine
from llmtrain.errors import CheckpointError, DataError, Problem
from llmtrain.files import disk_problem, write_atomically
from llmtrain.objectives.base import HasReference, Objective
from llmtrain.standard_streams import Say
from llmtrain.train.config import TrainConfig
from llmtrain.train.evaluation import evaluate_dataset
from llmtrain.train.starting import StartingPoint

PATTERN = "reference-*.safetensors"
_NAMES = {False: "train", True: "validation"}
"""Whether rows are held out → name of their tensor."""


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
    found = processes.from_main(read_reference(folders, given) if processes.is_main() else None)
    if found is None and start.step > 0:
        got = f"no {PATTERN} of these data, which the run computed before its first step"
        remedy = "restore the file, or begin another run.dir"
        raise processes.everywhere(CheckpointError(Problem(f"run.dir={config.run.dir}", got, remedy=remedy)))
    if found is None:
        say("computing the reference: log-probabilities under the weights that training starts from")
        found = {held_out: _predictions(engine, given[held_out], config, data_rank) for held_out in given}
        predictions = found
        processes.on_main(lambda: _write(config.run.dir, given, predictions))
    objective.references = found


def reference_of(checkpoint: Path, dataset: Dataset) -> dict[bool, np.ndarray]:
    """Return the reference of the rows that a trained model is evaluated on. Raise DataError if its run has
    none of them."""
    for held_out in _NAMES:
        found = read_reference([checkpoint.parents[1]], {held_out: dataset})
        if found is not None:
            return {True: found[held_out]}
    allowed = "the rows that the run trained on or validated with, whose reference is in its folder"
    raise DataError(Problem("data", "other rows, or another length", allowed, "leave data and split out"))


def read_reference(folders: list[Path], datasets: Mapping[bool, Dataset]) -> dict[bool, np.ndarray] | None:
    """Return whether rows are held out → their reference, from the first folder that has it whole; None: none
    has."""
    for folder in folders:
        for path in sorted(folder.glob(PATTERN)):
            found = _read(path, datasets)
            if found is not None:
                return found
    return None


def _read(path: Path, datasets: Mapping[bool, Dataset]) -> dict[bool, np.ndarray] | None:
    try:
        if xxhash.xxh3_128_hexdigest(path.read_bytes()) != path.stem.split("-")[-1]:
            return None
        with safe_open(path, framework="numpy") as file:
            said = file.metadata() or {}
            found = {}
            for held_out, dataset in datasets.items():
                name = _NAMES[held_out]
                if said.get(name) != dataset.fingerprint:
                    return None
                found[held_out] = file.get_tensor(name)
            return found
    except (OSError, SafetensorError, ValueError):
        return None


def _predictions(engine: Engine, dataset: Dataset, config: TrainConfig, data_rank: int) -> np.ndarray:
    totals = evaluate_dataset(engine, dataset, engine.layout, data_rank, config.data.workers, None)
    return np.stack([totals.rows[index] for index in range(len(dataset))]).astype(np.float32)


def _write(folder: Path, datasets: Mapping[bool, Dataset], found: Mapping[bool, np.ndarray]) -> None:
    tensors = {_NAMES[held_out]: array for held_out, array in found.items()}
    said = {_NAMES[held_out]: dataset.fingerprint for held_out, dataset in datasets.items()}
    content = save(tensors, metadata=said)
    try:
        for old in folder.glob(PATTERN):
            old.unlink()
        write_atomically(folder / f"reference-{xxhash.xxh3_128_hexdigest(content)}.safetensors", content)
    except OSError as error:
        raise CheckpointError(disk_problem(error, folder, key="run.dir")) from error
