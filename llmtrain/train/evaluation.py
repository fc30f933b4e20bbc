"""Evaluation of the model during training."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import closing

from llmtrain.data.datasets.base import Dataset
from llmtrain.data.loader import MicroBatch, evaluation_batches
from llmtrain.engine.base import Engine
from llmtrain.engine.evaluation import Totals
from llmtrain.parallel.layout import Layout


def evaluate_dataset(
    engine: Engine,
    dataset: Dataset,
    layout: Layout,
    data_rank: int,
    workers: int,
    max_samples: int | None,
    between: Callable[[], None] = lambda: None,
    rows: range | None = None,
) -> Totals:
    """Return loss and metric sums over `max_samples` of `dataset`, evenly spaced, or over `rows`; None: over
    all.

    All ranks call `between` before each batch; an exception that it raises ends the evaluation.
    """
    batches = evaluation_batches(
        dataset,
        engine.objective.collate,
        micro_size=layout.micro_size,
        data_rank=data_rank,
        data_size=layout.data,
        workers=workers,
        max_samples=max_samples,
        rows=rows,
    )

    def watched() -> Iterator[MicroBatch]:
        for batch in batches:
            between()
            yield batch

    with closing(batches):
        return engine.evaluate(watched())
