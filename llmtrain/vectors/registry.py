"""Registry of the families of word vectors: how each is trained."""

from __future__ import annotations

from collections.abc import Callable

from llmtrain.vectors.config import VocabularyKeys
from llmtrain.vectors.trainer import Build, Setting, Trainer


def _prediction() -> Build:
    from llmtrain.vectors.prediction import Prediction

    return Prediction


def _glove() -> Build:
    from llmtrain.vectors.glove import Glove

    return Glove


def _one_hot() -> Build:
    from llmtrain.vectors.one_hot import OneHot

    return OneHot


TRAINERS: dict[str, Callable[[], Build]] = {
    "word2vec": _prediction,
    "fasttext": _prediction,
    "glove": _glove,
    "one_hot": _one_hot,
}


def build_trainer(config: VocabularyKeys, setting: Setting) -> Trainer:
    """Return the trainer of a model of word vectors. Raise ConfigError if its kernel cannot be built."""
    family: str = config.family  # type: ignore[attr-defined]
    return TRAINERS[family]()(config, setting)
