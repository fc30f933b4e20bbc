"""Count the samples and targets of a global batch over all ranks, before its first forward pass."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
import torch

from llmtrain.data.loader import MicroBatch
from llmtrain.data.stream import combine_digests
from llmtrain.distributed import processes
from llmtrain.objectives.base import Batch, Objective, WeighsTerms
from llmtrain.parallel.mesh import Mesh


class Counts(NamedTuple):
    """Of a whole global batch, the same on all ranks."""

    targets: int
    data_digest: int
    """Hash of the content and order of all samples."""
    skipped: int
    """Samples that were left empty."""
    of_terms: np.ndarray
    """Targets of each term of the loss, int64 (K,); (0,) for a loss of one term."""


def count(
    objective: Objective,
    micro_batches: Sequence[MicroBatch],
    batches: Sequence[Batch],
    mesh: Mesh,
    device: torch.device,
) -> Counts:
    """Return the counts of all ranks' micro-batches. A collective. batches: this rank's parts of them."""
    terms = objective if isinstance(objective, WeighsTerms) else None
    of_terms = [terms.term_counts(batch) for batch in batches] if terms is not None else []
    counts = np.zeros(3 + (len(of_terms[0]) if of_terms else 0), dtype=np.int64)
    if mesh.contributes_loss:
        counts[0] = sum(objective.target_count(batch) for batch in batches)
        counts[3:] = np.sum(of_terms, axis=0) if of_terms else 0
    if mesh.contributes_loss and mesh.coordinates.sequence == 0:
        counts[1] = sum(micro.digest for micro in micro_batches)
        counts[2] = sum(micro.num_skipped for micro in micro_batches)
    targets, digests, skipped, *rest = processes.all_sum(torch.from_numpy(counts).to(device)).tolist()
    return Counts(targets, combine_digests(digests), skipped, np.array(rest, dtype=np.int64))


def weighed(objective: Objective, batches: Sequence[Batch], counts: Counts) -> list[Batch]:
    """Return the batches with the factors of the terms of the loss, if it has several."""
    if not isinstance(objective, WeighsTerms):
        return list(batches)
    return [objective.weighed(batch, counts.of_terms) for batch in batches]
