"""Texts that an encoder–decoder writes for rows of a validation table during training, with their figures."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from llmtrain.config import decode_json
from llmtrain.corpus.text_source import TextSource
from llmtrain.engine.base import Engine
from llmtrain.errors import UserError
from llmtrain.generation.config import GenerateConfig
from llmtrain.generation.written import Writer, figures_of, written_texts
from llmtrain.interchange.trained import TrainedModel
from llmtrain.models.huggingface.origin import Origin
from llmtrain.scoring.texts import MEASURES
from llmtrain.standard_streams import Say
from llmtrain.train.writing_rules import rows_to_write

if TYPE_CHECKING:
    from llmtrain.train.config import TrainConfig


def without_weights(config: TrainConfig, corpora: TextSource, origin: Any) -> TrainedModel:
    """Return what a run trains, for a look at all but its weights. origin: as in ValidationWriter."""
    return TrainedModel(
        config.run.dir,
        config.model,
        config.objective,
        {},
        corpora.tokenizer_path,
        step=0,
        sequence_length=config.batch.sequence_length,
        origin=None if origin is None else decode_json(Origin, origin),
    )


class ValidationWriter:
    """Writes with the weights of an engine. All ranks call it together."""

    def __init__(self, config: TrainConfig, corpora: TextSource, origin: Any, say: Say) -> None:
        """origin: settings of the Hugging Face folder that the weights came from, as JSON; None: none."""
        self.rows = rows_to_write(config)
        self._say = say
        self._trained = without_weights(config, corpora, origin)
        self._writer: Writer | None = None

    def figures(self, engine: Engine, dataset: Any) -> dict[str, float]:
        """Return the figures of the texts of the first rows of a TextPairs, on rank 0; on others nothing.
        Warn and return nothing if the model cannot write, as with logits that are not finite."""
        engine.model.eval()
        try:
            if self._writer is None or self._writer.model is not engine.model:
                self._writer = Writer(self._trained, engine.model, GenerateConfig())
            texts = written_texts(self._writer, dataset, engine.mesh, self.rows)
        except UserError as error:
            self._say(f"warning: no texts were scored: {error}")
            return {}
        finally:
            engine.model.train()
        found = figures_of(texts, dataset, intervals=False)
        return {name: found[name].value for name in MEASURES if name in found}
