"""Samples of text: what a model in training writes after the first beginnings of the validation split.

The most likely token is taken each time, so nothing is drawn and training is the same without.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

from llmtrain import files
from llmtrain.corpus.text_source import TextSource
from llmtrain.data.datasets.answers import LastAnswers
from llmtrain.distributed import processes
from llmtrain.engine.base import Engine
from llmtrain.errors import UserError
from llmtrain.generation.config import GenerateConfig
from llmtrain.generation.settings import text_ends
from llmtrain.generation.written import AnswerWriter, Writer, written_texts
from llmtrain.standard_streams import Say
from llmtrain.track.base import WrittenText
from llmtrain.train.writing import without_weights

if TYPE_CHECKING:
    from pathlib import Path

    from torch import nn

    from llmtrain.interchange.trained import TrainedModel
    from llmtrain.train.config import TrainConfig

MOST_TOKENS = 32
"""Tokens of a continuation, and of a beginning that is cut from a text."""


class Beginnings:
    """The first tokens of rows of packed documents."""

    def __init__(self, dataset: Any, most: int) -> None:
        """dataset: its samples have "tokens" and "documents". Of the first document in each of the first
        `most` rows take half, MOST_TOKENS at most. Raise DataError if the rows cannot be read."""
        self.rows = np.arange(min(most, len(dataset)))
        raw = dataset.get(self.rows)
        lengths = (raw["documents"] == raw["documents"][:, :1]).sum(axis=1)
        kept = np.clip(lengths // 2, 1, MOST_TOKENS).tolist()
        self._sources = [tokens[:length] for tokens, length in zip(raw["tokens"], kept, strict=True)]

    def source(self, sample: int) -> np.ndarray:
        """Return the ids of a beginning."""
        source: np.ndarray = self._sources[sample]
        return source


class ContinuationWriter:
    """Continues beginnings, many at a time."""

    def __init__(self, trained: TrainedModel, model: nn.Module, config: GenerateConfig) -> None:
        """model: the trained one, built."""
        self._model, self._tokenizer, self._config = model, trained.tokenizer(), config
        self._ends = text_ends(trained, self._tokenizer.eos_id)

    def write(self, sources: Sequence[np.ndarray], on_done: Callable[[int], None] | None = None) -> list[str]:
        """Return the continuation of each beginning, given as ids."""
        from llmtrain.generation.generate import generate

        ids = [source.tolist() for source in sources]
        found = generate(self._model, ids, self._config, eos_ids=self._ends, on_done=on_done)
        # The model may have more ids than the tokenizer.
        known = self._tokenizer.vocab_size
        return [
            self._tokenizer.decode_after(before, [token for token in new if token < known])
            for before, new in zip(ids, found, strict=True)
        ]


class TextSampler:
    """Writes samples with the weights of an engine. All ranks call it together."""

    def __init__(self, config: TrainConfig, corpora: TextSource, origin: Any, say: Say) -> None:
        """origin: settings of the Hugging Face folder that the weights came from, as JSON; None: none."""
        self._most, self._say = config.evaluation.texts, say
        self._trained = without_weights(config, corpora, origin)
        self._tokenizer = self._trained.tokenizer()
        self._rows: Any = None

    def texts(self, engine: Engine, dataset: Any) -> list[WrittenText]:
        """Return the samples on rank 0; on others nothing. Warn and return nothing if the model cannot write,
        as with logits that are not finite."""
        engine.model.eval()
        try:
            if self._rows is None:
                self._rows = processes.agree(lambda: self._rows_of(dataset))
            found = written_texts(self._writer(engine.model), self._rows, engine.mesh, self._most)
        except UserError as error:
            self._say(f"warning: no samples of text were written: {error}")
            return []
        finally:
            engine.model.train()
        return [WrittenText(self._beginning(sample), found[sample]) for sample in sorted(found)]

    def _rows_of(self, dataset: Any) -> Any:
        objective = self._trained.objective
        if objective.writes_answers:
            ends = text_ends(self._trained, self._tokenizer.eos_id)
            return LastAnswers(dataset, self._tokenizer, ends)
        return dataset if objective.paired == "needed" else Beginnings(dataset, self._most)

    def _writer(self, model: nn.Module) -> Writer | AnswerWriter | ContinuationWriter:
        trained, objective = self._trained, self._trained.objective
        if objective.paired == "needed":
            most = objective.target_length or trained.sequence_length or MOST_TOKENS
            return Writer(trained, model, _greedy(min(most, MOST_TOKENS)))
        longest = trained.config.longest_row
        rows = self._rows.rows[: self._most].tolist()
        used = max((len(self._rows.source(row)) for row in rows), default=0)
        config = _greedy(MOST_TOKENS if longest is None else max(1, min(longest - used, MOST_TOKENS)))
        if objective.writes_answers:
            return AnswerWriter(trained, model, config, self._rows)
        return ContinuationWriter(trained, model, config)

    def _beginning(self, sample: int) -> str:
        known = self._tokenizer.vocab_size
        return self._tokenizer.decode(
            [token for token in self._rows.source(sample).tolist() if token < known]
        )


def _greedy(tokens: int) -> GenerateConfig:
    return GenerateConfig(max_new_tokens=tokens, temperature=0.0, num_beams=1)


def leave_texts(folder: Path, step: int, texts: Sequence[WrittenText]) -> None:
    """Write the samples of a step to a file of JSON lines in `folder`. Raise OSError if that fails."""
    folder.mkdir(exist_ok=True)
    lines = (json.dumps({"step": step, **text._asdict()}, ensure_ascii=False) + "\n" for text in texts)
    files.write_atomically(folder / f"step-{step:08d}.jsonl", "".join(lines))
