"""BLEU of what an encoder–decoder writes for held-out sources (Papineni et al. 2002, as sacrebleu counts it,
arXiv:1804.08771)."""

from __future__ import annotations

import importlib.util
from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

import numpy as np

from llmtrain.engine.sharing import SharingConfig
from llmtrain.errors import ConfigError, Problem, UserError
from llmtrain.generation.answer import Texts, refuse_pipeline_of_answers
from llmtrain.generation.config import GenerateConfig
from llmtrain.generation.progress import Progress
from llmtrain.generation.settings import resolved_for, text_ends
from llmtrain.objectives.base import ObjectiveConfig

if TYPE_CHECKING:
    from torch import nn

    from llmtrain.data.datasets.base import Dataset
    from llmtrain.interchange.trained import TrainedModel
    from llmtrain.parallel.mesh import Mesh

ROWS_READ = 64
"""Rows of a dataset read at once."""


def check_bleu(objective: ObjectiveConfig, parallel: SharingConfig) -> None:
    """Raise ConfigError for a model that learns from no pairs and no conversations, an encoder–decoder in a
    pipeline, and without sacrebleu."""
    if objective.paired != "needed" and not objective.writes_answers:
        got = "true with a model that did not learn from pairs of texts, nor to answer"
        remedy = "give one that was trained with objective=seq2seq or instruct"
        raise ConfigError(Problem("bleu", got, "false", remedy))
    if objective.paired == "needed":
        refuse_pipeline_of_answers(parallel)
    if importlib.util.find_spec("sacrebleu") is None:
        install = 'pip install "llmtrain[seq2seq]"'
        raise ConfigError(Problem("bleu", "true without the package sacrebleu", "", install))


def translation_figures(
    trained: TrainedModel,
    model: nn.Module,
    dataset: Dataset,
    config: GenerateConfig,
    mesh: Mesh,
    max_samples: int | None,
) -> dict[str, Any]:
    """BLEU over the pairs of the first `max_samples` rows, and sacrebleu's signature; references are the
    corpus' targets as the tokenizer writes them. On rank 0; on others nothing.

    All processes call it together; data-parallel ones share the pairs."""
    from llmtrain.distributed import processes
    from llmtrain.generation.generate import generate

    texts = Texts(trained)
    num_rows = len(dataset) if max_samples is None else min(len(dataset), max_samples)
    pairs = list(pairs_of(dataset, num_rows))
    rank, size = mesh.coordinates.data, mesh.layout.data
    own = pairs[rank::size]
    progress = Progress(len(own)) if processes.is_main() else None
    try:
        sources = [source for source, _ in own]
        settings, ends = resolved_for(trained, config, 1), text_ends(trained, texts.eos_id)
        found = generate(model, sources, settings, eos_ids=ends, on_done=progress)
    except UserError as error:  # too long a pair or a diverged model: what one rank finds, others may not
        error.everywhere = True if size == 1 else None
        raise
    # Processes that share the model wrote the same.
    speaks = mesh.coordinates.tensor == 0
    written = [texts.target(ids) for ids in found] if speaks else []
    references = [texts.target(target) for _, target in own] if speaks else []
    gathered = processes.gather_to_main((written, references))
    if not processes.is_main():
        return {}
    from sacrebleu.metrics import BLEU

    metric = BLEU()
    written = [text for texts_of_rank, _ in gathered for text in texts_of_rank]
    references = [text for _, texts_of_rank in gathered for text in texts_of_rank]
    score = metric.corpus_score(written, [references])
    return {
        "bleu": float(score.score),
        "bleu_pairs": len(written),
        "bleu_signature": str(metric.get_signature()),
    }


def pairs_of(dataset: Dataset, num_rows: int) -> Iterator[tuple[list[int], list[int]]]:
    """Ids of each source, with its end, and of its target, without."""
    for start in range(0, num_rows, ROWS_READ):
        raw = dataset.get(np.arange(start, min(start + ROWS_READ, num_rows)))
        for row in range(len(raw["sources"])):
            source_documents, documents = raw["source_documents"][row], raw["documents"][row]
            for pair in range(int(documents.max()) + 1):
                source = raw["sources"][row][source_documents == pair]
                yield source.tolist(), raw["targets"][row][documents == pair][:-1].tolist()
