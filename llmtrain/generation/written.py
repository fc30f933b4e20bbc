"""Generate the targets of a table's sources with an encoder–decoder, or the answers to its prompts with a
decoder, and score them."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from typing import TYPE_CHECKING, Any, Protocol

import numpy as np

from llmtrain.engine.sharing import SharingConfig
from llmtrain.errors import UserError
from llmtrain.generation.answer import Texts, refuse_pipeline_of_answers
from llmtrain.generation.config import GenerateConfig
from llmtrain.generation.progress import Progress
from llmtrain.generation.settings import resolved_for, text_ends
from llmtrain.objectives.base import ObjectiveConfig
from llmtrain.scoring.texts import check_packages, text_figures

if TYPE_CHECKING:
    from torch import nn

    from llmtrain.data.datasets.answers import LastAnswers
    from llmtrain.data.datasets.text_pairs import TextPairs
    from llmtrain.interchange.trained import TrainedModel
    from llmtrain.parallel.mesh import Mesh


class WritesTexts(Protocol):
    """Writes a text for each source, many at a time."""

    def write(
        self, sources: Sequence[np.ndarray], on_done: Callable[[int], None] | None = None
    ) -> list[str]: ...


class HasSources(Protocol):
    """Samples that a model is given to write after."""

    @property
    def rows(self) -> np.ndarray:
        """Row of each sample."""

    def source(self, sample: int) -> np.ndarray:
        """Return the ids that a model is given."""


class Writer:
    """Writes the target of each source, many at a time."""

    def __init__(self, trained: TrainedModel, model: nn.Module, config: GenerateConfig) -> None:
        """model: the trained one, built. Raise ConfigError for settings that it cannot follow."""
        self.model = model
        self._texts = Texts(trained)
        target_length = trained.objective.target_length or trained.sequence_length
        if config.max_new_tokens is None and target_length is not None:
            # As long as the targets that it was trained on.
            config = replace(config, max_new_tokens=target_length)
        self._settings = resolved_for(trained, config, 1)
        self._ends = text_ends(trained, self._texts.eos_id)

    def write(self, sources: Sequence[np.ndarray], on_done: Callable[[int], None] | None = None) -> list[str]:
        """Return the text for each source, given as ids with its end."""
        from llmtrain.generation.generate import generate

        ids = [source.tolist() for source in sources]
        found = generate(self.model, ids, self._settings, eos_ids=self._ends, on_done=on_done)
        return [self._texts.target(target) for target in found]


class AnswerWriter:
    """Writes the answer to each prompt, as `llmtrain generate` does."""

    def __init__(
        self, trained: TrainedModel, model: nn.Module, config: GenerateConfig, prompts: LastAnswers
    ) -> None:
        """prompts: those to be answered; no answer becomes longer than the longest of theirs, or than the
        model has room for after the longest prompt, unless the config says so. Without a temperature in the
        config the most likely token is taken. Raise ConfigError for settings that the model cannot follow."""
        self._model, self._tokenizer = model, trained.tokenizer()
        if config.max_new_tokens is None:
            most = trained.config.longest_row
            room = prompts.longest if most is None else most - prompts.longest_source
            config = replace(config, max_new_tokens=max(1, min(prompts.longest, room)))
        if config.temperature is None and config.top_k is None and config.top_p is None:
            config = replace(config, temperature=0.0)
        self._settings = resolved_for(trained, config, 1)
        self._ends = text_ends(trained, self._tokenizer.eos_id)

    def write(self, sources: Sequence[np.ndarray], on_done: Callable[[int], None] | None = None) -> list[str]:
        """Return the answer to each prompt, given as ids."""
        from llmtrain.generation.generate import generate

        ids = [source.tolist() for source in sources]
        found = generate(self._model, ids, self._settings, eos_ids=self._ends, on_done=on_done)
        decode = self._tokenizer.decode_after
        return [decode(before, answer).strip() for before, answer in zip(ids, found, strict=True)]


def check_written(objective: ObjectiveConfig, parallel: SharingConfig) -> None:
    """Raise ConfigError for an encoder–decoder in a pipeline, and without the packages that count."""
    if not objective.writes_answers:
        refuse_pipeline_of_answers(parallel)
    check_packages("bleu")


def written_texts(
    writer: WritesTexts,
    dataset: HasSources,
    mesh: Mesh,
    max_samples: int | None,
    shows_progress: bool = False,
) -> dict[int, str]:
    """Return what the model writes for the first `max_samples` rows, by the number of a sample, on rank 0; on
    others nothing. Raise UserError on all ranks for one that any of them meets.

    All processes call it together; data-parallel ones share the rows."""
    from llmtrain.distributed import processes

    _, samples = np.unique(dataset.rows, return_index=True)  # a row to train on has a sample for each target
    own = samples[:max_samples][mesh.coordinates.data :: mesh.layout.data].tolist()
    progress = Progress(len(own)) if shows_progress and processes.is_main() else None
    texts: list[str] = []
    problem: UserError | None = None
    try:
        texts = writer.write([dataset.source(sample) for sample in own], progress)
    except UserError as error:  # a diverged model: what one rank meets, those with other rows may not
        problem = error
    if problems := [found for found in processes.gather(problem) if found is not None]:
        raise processes.everywhere(problems[0])
    # Processes that share the model wrote the same.
    speaks = mesh.coordinates.tensor == 0
    gathered = processes.gather_to_main(dict(zip(own, texts, strict=True)) if speaks else {})
    if not processes.is_main():
        return {}
    return {sample: text for of_rank in gathered for sample, text in of_rank.items()}


def figures_of(
    texts: Mapping[int, str], dataset: TextPairs | LastAnswers, intervals: bool = True
) -> dict[str, Any]:
    """Return the figures of texts that were written for samples; none of none. The references are the texts
    of the table."""
    if not texts:
        return {}
    in_order = sorted(texts)
    references = [dataset.references(sample) for sample in in_order]
    figures = text_figures([texts[sample] for sample in in_order], references, intervals)
    return {"written": len(texts), **figures}


def written_figures(
    trained: TrainedModel,
    model: nn.Module,
    dataset: Any,
    config: GenerateConfig,
    mesh: Mesh,
    max_samples: int | None,
) -> dict[str, Any]:
    """Return the figures of what a trained model writes for the first `max_samples` rows, or the last answers
    of as many conversations, on rank 0; on others nothing."""
    writer: Writer | AnswerWriter
    if trained.objective.writes_answers:
        from llmtrain.data.datasets.answers import LastAnswers

        tokenizer = trained.tokenizer()
        dataset = LastAnswers(dataset, tokenizer, text_ends(trained, tokenizer.eos_id))
        writer = AnswerWriter(trained, model, config, dataset)
    else:
        writer = Writer(trained, model, config)
    return figures_of(written_texts(writer, dataset, mesh, max_samples, shows_progress=True), dataset)
