"""Generate the targets of a table's sources with an encoder–decoder, and score them."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import TYPE_CHECKING, Any

import numpy as np

from llmtrain.engine.sharing import SharingConfig
from llmtrain.errors import UserError
from llmtrain.generation.answer import Texts, refuse_pipeline_of_answers
from llmtrain.generation.config import GenerateConfig
from llmtrain.generation.progress import Progress
from llmtrain.generation.settings import resolved_for, text_ends
from llmtrain.scoring.texts import check_packages, text_figures

if TYPE_CHECKING:
    from torch import nn

    from llmtrain.data.datasets.text_pairs import TextPairs
    from llmtrain.interchange.trained import TrainedModel
    from llmtrain.parallel.mesh import Mesh


class Writer:
    """Writes the target of each source, many at a time."""

    def __init__(self, trained: TrainedModel, model: nn.Module, config: GenerateConfig) -> None:
        """model: the trained one, built. Raise ConfigError for settings that it cannot follow."""
        self._model = model
        self._texts = Texts(trained)
        target_length = getattr(trained.objective, "target_length", None) or trained.sequence_length
        if config.max_new_tokens is None and target_length is not None:
            # As long as the targets that it was trained on.
            config = replace(config, max_new_tokens=target_length)
        self._settings = resolved_for(trained, config, 1)
        self._ends = text_ends(trained, self._texts.eos_id)

    def write(self, sources: Sequence[np.ndarray], on_done: Callable[[int], None] | None = None) -> list[str]:
        """Return the text for each source, given as ids with its end."""
        from llmtrain.generation.generate import generate

        ids = [source.tolist() for source in sources]
        found = generate(self._model, ids, self._settings, eos_ids=self._ends, on_done=on_done)
        return [self._texts.target(target) for target in found]


def check_written(parallel: SharingConfig) -> None:
    """Raise ConfigError for pipelines, and without the packages that count."""
    refuse_pipeline_of_answers(parallel)
    check_packages("bleu")


def written_figures(
    trained: TrainedModel,
    model: nn.Module,
    dataset: TextPairs,
    config: GenerateConfig,
    mesh: Mesh,
    max_samples: int | None,
) -> dict[str, Any]:
    """Return the figures of what the model writes for the first `max_samples` rows, on rank 0; on others
    nothing. The references are the texts of the table.

    All processes call it together; data-parallel ones share the rows."""
    from llmtrain.distributed import processes

    _, samples = np.unique(dataset.rows, return_index=True)  # a row to train on has a sample for each target
    samples = samples[:max_samples]
    place, places = mesh.coordinates.data, mesh.layout.data
    own = samples[place::places].tolist()
    progress = Progress(len(own)) if processes.is_main() else None
    try:
        written = Writer(trained, model, config).write([dataset.source(sample) for sample in own], progress)
    except UserError as error:  # a diverged model: what one rank finds, others may not
        error.everywhere = True if places == 1 else None
        raise
    # Processes that share the model wrote the same.
    speaks = mesh.coordinates.tensor == 0
    gathered = processes.gather_to_main(dict(zip(own, written, strict=True)) if speaks else {})
    if not processes.is_main():
        return {}
    texts = {sample: text for of_rank in gathered for sample, text in of_rank.items()}
    in_order = sorted(texts)
    figures = text_figures([texts[n] for n in in_order], [dataset.references(n) for n in in_order])
    return {"written": len(texts), **figures}
