"""The vectors that stand for the texts of a split: computed once, by all ranks, and kept in a cache."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property, partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np
import torch
import xxhash
from torch import nn

from llmtrain.config import encode
from llmtrain.data.order import batches_by_length
from llmtrain.distributed import processes
from llmtrain.engine.build import build_for_use
from llmtrain.engine.modules import autocast, to_device
from llmtrain.features.cache import VectorCache, vectors_key
from llmtrain.nn.task_head import TextVectors
from llmtrain.parallel.config import Precision
from llmtrain.parallel.materialize import Source
from llmtrain.parallel.mesh import Mesh
from llmtrain.watch import phases

if TYPE_CHECKING:
    from llmtrain.data.datasets.examples import Examples
    from llmtrain.objectives.task import Task

TOKENS = 8192
"""Tokens in a forward pass, padding included."""


def build_trunk(model: Any, mesh: Mesh, device: torch.device, source: Source) -> nn.Module:
    """Return a model with the weights of `source` that returns the vector of each text in place of logits.
    Called by all ranks together."""
    module = build_for_use(model, mesh, device, source)
    module.head = TextVectors(model.task)
    return module


class _Store(NamedTuple):
    """The vectors of a split and their cache, on rank 0 alone."""

    cache: VectorCache
    vectors: np.ndarray
    """Vectors of all rows, fp32 (N, D); those of absent rows are not set yet."""
    absent: list[range]
    """The rows of each chunk that is not in the cache."""


@dataclass(frozen=True)
class Vectorizer:
    """A frozen trunk that gives a vector for each text."""

    model: nn.Module
    """That of `build_trunk`."""
    model_config: Any
    task: Task
    device: torch.device
    precision: Precision
    cache: Path
    """The folder of the caches of all splits and trunks."""
    say: Callable[[str], None]

    def vectors(self, split: str, examples: Examples) -> np.ndarray | None:
        """Return the vectors of all rows of a split, fp32 (N, D), on rank 0, and None on the others.
        Called by all ranks together. Raise DataError for a disk that refuses the cache."""
        started = time.perf_counter()
        folder = self.cache / vectors_key(self._identity(examples))
        store = processes.agree(lambda: self._open(folder, len(examples)) if processes.is_main() else None)
        absent: list[range] = processes.from_main([] if store is None else store.absent)
        for first in range(0, len(absent), processes.world_size()):
            of_round = absent[first : first + processes.world_size()]
            mine = of_round[processes.rank()] if processes.rank() < len(of_round) else None
            made = processes.gather_to_main(None if mine is None else self._compute(examples, mine))
            processes.agree(partial(_keep, store, of_round, made))
        rows = sum(map(len, absent))
        rate = f" at {rows / (time.perf_counter() - started):,.0f} rows/s" if rows else ""
        self.say(f"vectors of {split}: {len(examples) - rows:,} from the cache, {rows:,} computed{rate}")
        return None if store is None else store.vectors

    def _open(self, folder: Path, rows: int) -> _Store:
        cache = VectorCache(folder, rows, self.model_config.output_width)
        return _Store(cache, *cache.read())

    def _identity(self, examples: Examples) -> dict[str, Any]:
        """Return all that determines the vectors: weights, rows, and how they are computed."""
        return {
            "weights": self._digest,
            "model": {key: value for key, value in encode(self.model_config).items() if key != "task"},
            "rows": examples.fingerprint,
            "pooling": self.task.head.pooling,
            "precision": self.precision,
            "device": self.device.type,
        }

    @cached_property
    def _digest(self) -> str:
        digest = xxhash.xxh3_128()
        for name, parameter in self.model.named_parameters():
            digest.update(name.encode())
            digest.update(parameter.detach().cpu().contiguous().numpy().tobytes())
        return digest.hexdigest()

    @torch.no_grad()
    def _compute(self, examples: Examples, chunk: range) -> np.ndarray:
        vectors_MD = np.empty((len(chunk), self.model_config.output_width), np.float32)
        for rows in batches_by_length(examples.lengths[chunk.start : chunk.stop], TOKENS):
            phases.go_on()
            batch = to_device(self.task.collate(examples.get(rows + chunk.start)), self.device)
            with autocast(self.precision, self.device):
                vectors_MD[rows] = self.model(**self.task.inputs(batch)).float().cpu().numpy()
        return vectors_MD


def _keep(store: _Store | None, chunks: list[range], made: list[np.ndarray | None]) -> None:
    """Keep what all ranks have computed; on rank 0, the only one with a store."""
    if store is not None:
        for chunk, vectors_MD in zip(chunks, made, strict=False):
            assert vectors_MD is not None, "each chunk has a rank"
            store.cache.write(chunk, vectors_MD)
            store.vectors[chunk.start : chunk.stop] = vectors_MD
