"""Checkpoints of word vectors, in the form of all others, with the vocabulary beside the vectors."""

from __future__ import annotations

import shutil
from collections.abc import Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import numpy as np
import torch

from llmtrain import files
from llmtrain.checkpoint import retention, store
from llmtrain.checkpoint.manifest import OPTIMIZER, WEIGHT
from llmtrain.checkpoint.reader import Checkpoint, Reader
from llmtrain.config import decode, encode
from llmtrain.errors import CheckpointError, Problem
from llmtrain.tensor_boxes import Shard, whole
from llmtrain.vectors.config import vectors_config_type
from llmtrain.vectors.keyed import GRAMS, VECTORS, WordVectors
from llmtrain.vectors.trainer import Trainer
from llmtrain.vectors.vocabulary import VOCABULARY, write_vocabulary

ONE_PROCESS = {"world_size": 1, "data": 1, "tensor": 1, "pipeline": 1, "sequence": 1, "zero": 0}


class VectorSaver:
    """Saves under `root`; with `asynchronous`, a copy of the state is written while training goes on."""

    def __init__(self, root: Path, vocabulary: Path, words_per_step: int, *, asynchronous: bool) -> None:
        self._root, self._vocabulary = root, vocabulary
        self._layout = {**ONE_PROCESS, "global_size": words_per_step}
        self._asynchronous = asynchronous
        self._writer = ThreadPoolExecutor(1)
        self._pending: Future[Path] | None = None

    def save(self, step: int, trainer: Trainer, description: Mapping[str, Any]) -> None:
        """Begin a checkpoint. Raise TrainingError if the one before, or this one, cannot be written."""
        self.finish()
        parts = [
            store.Part(kind, name, Shard(values.shape), 0, _copy(values))
            for kind, named in _state(trainer).items()
            for name, values in named.items()
        ]
        self._pending = self._writer.submit(self.write, step, parts, description)
        if not self._asynchronous:
            self.finish()

    def finish(self) -> Path | None:
        """Wait for the checkpoint that was begun, and return its path; None if none was."""
        pending, self._pending = self._pending, None
        return None if pending is None else pending.result()

    def is_written(self) -> bool:
        """Return whether a checkpoint was begun and is complete."""
        return self._pending is not None and self._pending.done()

    def close(self) -> None:
        """Wait for the writer, whatever it met."""
        self._writer.shutdown()

    def write(self, step: int, parts: list[store.Part], description: Mapping[str, Any]) -> Path:
        """Write a checkpoint and return its path. Raise TrainingError if it cannot be written."""
        partial = store.begin(self._root, step)
        problem = None
        try:
            share = store.write_share(partial, 0, store.Share(parts, {}, {}))
            copy = partial / VOCABULARY
            shutil.copyfile(self._vocabulary, copy)
            files.sync(copy)
            beside = {"file": copy.name, "bytes": copy.stat().st_size, "xxh3_128": files.checksum(copy)}
            # A share of no tensor, but of one more file.
            words = {**{key: type(value)() for key, value in share.items()}, "file": beside}
            at = {"saved_at": store.now(), "position": {"step": step}, "layout": self._layout}
            store.assemble(partial, step, [share, words], {**at, **description}, None)
        except Exception as error:  # told by raise_if_any, which removes what was written
            problem = store.why(error, partial)
        return store.conclude(partial, step, problem)


def _state(trainer: Trainer) -> dict[str, Mapping[str, np.ndarray]]:
    kinds = {f"{OPTIMIZER}{kind}": named for kind, named in trainer.optimizer_state().items()}
    return {WEIGHT: trainer.weights(), **kinds}


def _copy(values: np.ndarray) -> torch.Tensor:
    return torch.from_numpy(np.array(values, dtype=np.float32, order="C").reshape(-1))


def load(trainer: Trainer, checkpoint: Checkpoint) -> None:
    """Take over the state of a checkpoint. Raise CheckpointError for a part that it lacks."""
    reader = Reader(checkpoint)

    def read(kind: str, name: str) -> np.ndarray:
        full = f"{OPTIMIZER}{kind}" if kind else WEIGHT
        shape = tuple(checkpoint.entry(full, name)["shape"])
        return reader.read(full, name, whole(shape)).numpy().reshape(shape)

    trainer.load(read)


def import_vectors(vectors: WordVectors, folder: Path, source: str, overwrite: bool) -> Path:
    """Make a checkpoint of vectors of another program in `folder`, without the state of an optimizer; return
    its path. Raise CheckpointError for a folder that holds anything else, TrainingError if it cannot be
    written."""
    held = sorted(folder.iterdir()) if folder.is_dir() else [folder] if folder.exists() else []
    if any(not retention.list_held(path) or not _is_import(path) for path in held) or (
        held and not overwrite
    ):
        got, remedy = f"{folder}, which holds {held[0].name}", "give another output=…"
        remedy += ", or overwrite=true to replace an import"
        raise CheckpointError(Problem("output", got, "a new folder", remedy))
    weights = {VECTORS: vectors.matrix}
    model: dict[str, Any] = {"family": "word2vec", "dimensions": vectors.dimensions}
    if vectors.subwords is not None:
        weights[GRAMS] = vectors.subwords.matrix
        shortest, longest = vectors.subwords.shortest, vectors.subwords.longest
        model |= {"family": "fasttext", "shortest": shortest, "longest": longest}
        model["buckets"] = len(vectors.subwords.matrix)
    cls = vectors_config_type(model)
    assert cls is not None
    config = decode(cls, model)
    parts = [store.Part(WEIGHT, name, Shard(v.shape), 0, _copy(v)) for name, v in weights.items()]
    counts = vectors.counts if vectors.counts is not None else np.zeros(len(vectors.words), np.int64)
    with TemporaryDirectory(prefix="llmtrain-vectors-") as scratch:
        vocabulary = Path(scratch) / VOCABULARY
        write_vocabulary(vocabulary, vectors.words, counts)
        saver = VectorSaver(folder, vocabulary, 1, asynchronous=False)
        path = saver.write(0, parts, {"model": encode(config), "imported_from": source})
        saver.close()
    return path


def _is_import(path: Path) -> bool:
    return Checkpoint.open(path).is_imported
