"""The ids that a model has for what its corpora hold and its objective marks texts by."""

from __future__ import annotations

from dataclasses import replace

from llmtrain.corpus.corpora import Corpora
from llmtrain.errors import ConfigError, Problem
from llmtrain.models.bert.config import BertConfig
from llmtrain.models.configs import ModelConfig
from llmtrain.models.convolutional.config import SimpleCNNConfig
from llmtrain.models.encoder_decoder.config import Seq2SeqConfig


def resolve_vocabulary(model: ModelConfig, corpora: Corpora | None) -> ModelConfig:
    """The model with its vocabulary known: null takes the corpus' and the special tokens that its objective
    needs.

    Raises ConfigError when the corpus has ids that the model's embedding lacks.
    """
    if corpora is None or isinstance(model, SimpleCNNConfig):
        return model
    needed, special = corpora.vocab_size, ""
    if isinstance(model, BertConfig):
        if model.mask_id is None:
            own = corpora.special_ids if {"mask", "cls", "sep"} <= corpora.special_ids.keys() else {}
            ids = [own.get(role, needed + n) for n, role in enumerate(("mask", "cls", "sep"))]
            model = replace(model, mask_id=ids[0], cls_id=ids[1], sep_id=ids[2])
        needed = max(needed, *(i + 1 for i in model.special_ids))
        special = " with [MASK], [CLS] and [SEP]"
    if isinstance(model, Seq2SeqConfig):
        model, needed = _seq2seq_vocabulary(model, corpora)
        special = f" with what objective={model.objective.kind} marks texts by"
    if model.vocab_size is None:
        return replace(model, vocab_size=needed)
    if model.vocab_size < needed:
        raise ConfigError(
            Problem(
                "model.vocab_size",
                str(model.vocab_size),
                f"{needed} or more, the vocabulary of {corpora.where}{special}",
                "set model.vocab_size=null to take the corpus'",
            )
        )
    return model


def _seq2seq_vocabulary(model: Seq2SeqConfig, corpora: Corpora) -> tuple[Seq2SeqConfig, int]:
    """The model with the ids that its objective marks texts by, and how many rows its embedding needs. Where
    the tokenizer has none of its own they stand behind the corpus' vocabulary: start, [MASK], and sentinels
    at the embedding's end."""
    own, needed, kind = corpora.special_ids, corpora.vocab_size, model.objective.kind
    eos_id = corpora.eos_id if model.eos_id is None else model.eos_id
    start_id, mask_id, sentinel_id = model.start_id, model.mask_id, model.sentinel_id
    if start_id is None:
        # One that also ends documents would say that nothing follows.
        start_id = own["bos"] if own.get("bos", eos_id) != eos_id else needed
        needed = max(needed, start_id + 1)
    if kind == "denoising" and mask_id is None:
        mask_id = own.get("mask", needed)
        needed = max(needed, mask_id + 1)
    if kind == "span_corruption" and sentinel_id is None:
        count = model.objective.num_sentinels
        theirs = corpora.sentinel_ids[:count]
        if len(theirs) == count and theirs == tuple(range(theirs[0], theirs[0] - count, -1)):
            sentinel_id = theirs[0]
        else:
            needed += count
            sentinel_id = (model.vocab_size or needed) - 1
    needed = max(needed, *(i + 1 for i in (start_id, mask_id, sentinel_id, eos_id) if i is not None))
    model = replace(model, start_id=start_id, mask_id=mask_id, sentinel_id=sentinel_id, eos_id=eos_id)
    return model, needed
