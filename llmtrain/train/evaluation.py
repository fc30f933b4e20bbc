"""Evaluation of what an engine holds, during training."""

from __future__ import annotations

from llmtrain.data.datasets import Dataset
from llmtrain.data.loader import evaluation_batches
from llmtrain.engine.base import Engine
from llmtrain.engine.evaluation import Totals
from llmtrain.parallel.layout import Layout


def evaluate_dataset(
    engine: Engine, dataset: Dataset, layout: Layout, data_rank: int, workers: int, max_samples: int | None
) -> Totals:
    """Loss and metric sums over the first `max_samples` of `dataset`."""
    return engine.evaluate(
        evaluation_batches(
            dataset,
            engine.objective.collate,
            micro_size=layout.micro_size,
            data_rank=data_rank,
            data_size=layout.data,
            workers=workers,
            max_samples=max_samples,
        )
    )
