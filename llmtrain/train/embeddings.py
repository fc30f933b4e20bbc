"""`embeddings.path=FILE`: an embedding starts from word vectors."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from functools import lru_cache
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from llmtrain.config import require
from llmtrain.errors import ConfigError, DataError, Problem
from llmtrain.files import disk_problem, expand_home
from llmtrain.interchange.word_vectors import read_vectors
from llmtrain.nn.model_config import ModelConfig
from llmtrain.train.config import TrainConfig
from llmtrain.vectors.keyed import WordVectors

if TYPE_CHECKING:
    from torch import Tensor

    from llmtrain.corpus.text_source import TextSource
    from llmtrain.parallel.materialize import Source
    from llmtrain.standard_streams import Say
    from llmtrain.tensor_boxes import Shard

EMBEDDING = "embedding.weight"
"""The name of a model's embedding."""


@lru_cache(maxsize=1)
def vectors_of(path: Path) -> WordVectors:
    """Return the vectors of a file, which a run asks for more than once. Raise DataError."""
    return read_vectors(expand_home(path))


def embedding_problems(config: TrainConfig, is_pretrained: bool) -> Iterator[Problem]:
    """Yield a problem for word vectors that the model cannot start from. Raise DataError for a file that
    cannot be read."""
    path = config.embeddings.path
    if path is None:
        yield from require(not config.embeddings.freeze, "embeddings.freeze", True, "false without a path")
        return
    if is_pretrained:
        got = f"{path} with weights of model.path"
        yield Problem("embeddings.path", got, "null with model.path, which has an embedding", "leave it out")
    yield from _width_problems(config.model, path)


def _width_problems(model: ModelConfig, path: Path) -> Iterator[Problem]:
    width = model.embedding_width
    if width is None:
        yield Problem(
            "embeddings.path", f"{path} with model.family={model.family}", "null: it reads no words"
        )
        return
    dimensions = vectors_of(path).matrix.shape[1]
    if dimensions != width:
        got = f"{path}, vectors of {dimensions} numbers"
        yield Problem(
            "embeddings.path",
            got,
            f"{width}, the width of the embedding",
            f"set model.{model.embedding_key}={dimensions}",
        )


def tokenizer_of_words(config: TrainConfig) -> Path | None:
    """Return the file of the tokenizer of the vectors' words, for a table whose section names none; None if
    the tokenizer comes from elsewhere."""
    path = config.embeddings.path
    data: Any = config.data
    if path is None or not data.is_table or data.tokenizer is not None:
        return None
    from llmtrain.tokenizers.words import word_tokenizer

    words = vectors_of(path).words
    tokenizer = word_tokenizer(words, all(word == word.lower() for word in words), str(path))
    folder = expand_home(data.cache.dir) / f"tokenizer-{tokenizer.sha256[:32]}"
    try:
        folder.mkdir(parents=True, exist_ok=True)
        return tokenizer.save(folder)
    except OSError as error:
        raise DataError(disk_problem(error, folder, key="data.cache.dir")) from error


def with_frozen_embedding(config: TrainConfig) -> TrainConfig:
    """Return the configuration with the embedding added to train.freeze, if embeddings.freeze is true."""
    if not config.embeddings.freeze or EMBEDDING in config.train.freeze:
        return config
    return replace(config, train=replace(config.train, freeze=(*config.train.freeze, EMBEDDING)))


def known_words(config: TrainConfig, texts: TextSource) -> list[tuple[int, int]]:
    """Return (id, row of the vectors) of each word of the vocabulary that has a vector. Raise ConfigError if
    none has."""
    assert config.embeddings.path is not None
    pieces = texts.load_tokenizer().pieces()
    row_of = {word: row for row, word in enumerate(vectors_of(config.embeddings.path).words)}
    found = [(i, row_of[piece]) for i, piece in enumerate(pieces) if piece in row_of]
    if not found:
        got = f"{config.embeddings.path}, which has none of the {len(pieces):,} words of the tokenizer"
        remedy = "prepare with tokenizer.kind=words, or leave data.tokenizer out"
        raise ConfigError(Problem("embeddings.path", got, "vectors of its words", remedy))
    return found


def embedding_source(config: TrainConfig, texts: TextSource, otherwise: Source, say: Say) -> Source:
    """Return a function that gives the rows of the embedding that have a vector, and all else from
    `otherwise`."""
    import torch

    from llmtrain.checkpoint.reader import read_part

    assert config.embeddings.path is not None
    matrix, found = vectors_of(config.embeddings.path).matrix, known_words(config, texts)
    say(f"word vectors for {len(found):,} of {texts.vocab_size:,} words; the others start from the seed")
    ids, rows = np.array(found).T

    def source(out: Tensor, name: str, shard: Shard, start: int) -> None:
        if name != EMBEDDING:
            otherwise(out, name, shard, start)
            return
        weight = torch.empty(shard.shape)
        otherwise(weight.view(-1), name, replace(shard, index=0, count=1), 0)
        weight[torch.from_numpy(ids)] = torch.from_numpy(matrix[rows])
        read_part(weight, out, name, shard, start)

    return source
