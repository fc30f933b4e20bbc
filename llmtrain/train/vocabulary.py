"""The vocabulary of a model: the tokens of its corpora and the special tokens of its objective."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

from llmtrain.corpus.text_source import TextSource
from llmtrain.errors import ConfigError, Problem
from llmtrain.objectives.base import ObjectiveConfig


def resolve_vocabulary(model: Any, objective: ObjectiveConfig, corpora: TextSource | None) -> Any:
    """Return the model's config with its vocabulary known: null takes the corpus' and the special tokens that
    the objective needs.

    Raise ConfigError when the corpus has ids that the model's embedding lacks.
    """
    if corpora is None or not model.has_vocabulary:
        return model
    model, needed, marks = objective.special_ids(model, corpora)
    if model.vocab_size is None:
        return replace(model, vocab_size=needed)
    if model.vocab_size < needed:
        raise ConfigError(
            Problem(
                "model.vocab_size",
                str(model.vocab_size),
                f"{needed} or more, the vocabulary of {corpora.where}{marks}",
                "set model.vocab_size=null to take the corpus'",
            )
        )
    return model
