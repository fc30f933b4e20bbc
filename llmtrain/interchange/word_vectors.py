"""Read the word vectors of a run, of one of its checkpoints or of a file. Files are read without torch."""

from __future__ import annotations

from pathlib import Path

import numpy as np

from llmtrain import files
from llmtrain.errors import CheckpointError, DataError, Problem
from llmtrain.standard_streams import print_note
from llmtrain.vectors.config import vectors_config_type
from llmtrain.vectors.files_in import FileFormat, composed, read_file
from llmtrain.vectors.keyed import GRAMS, VECTORS, WordVectors
from llmtrain.vectors.ngrams import Subwords
from llmtrain.vectors.vocabulary import VOCABULARY, read_vocabulary


def read_vectors(path: Path, form: FileFormat = "auto") -> WordVectors:
    """Return the vectors at `path`: a run folder (its newest undamaged checkpoint), a checkpoint folder, or a
    file in any form that `llmtrain vectors import` reads, which `form` names.

    Raise CheckpointError for a folder without word vectors, or one that is damaged, DataError for a file that
    cannot be read.
    """
    path = files.expand_home(path)
    if not path.exists():
        allowed = "a run of model=word2vec, one of its checkpoints, or a file of vectors"
        raise DataError(Problem(str(path), "no such file or folder", allowed, "check the name"))
    return _read_checkpoint(path) if path.is_dir() else read_file(path, form)


def read_words_and_matrix(path: Path) -> tuple[list[str], np.ndarray]:
    """Return the words at `path`, as read_vectors finds them, and their vectors, (words, dimensions)
    float32."""
    vectors = read_vectors(path)
    return list(vectors.words), np.asarray(vectors.matrix, dtype=np.float32)


def _read_checkpoint(path: Path) -> WordVectors:
    from llmtrain.checkpoint.retention import find

    checkpoint = find(path, print_note)
    checkpoint.require("model")
    folder, model = checkpoint.path, checkpoint.manifest["model"]
    if vectors_config_type(model) is None or not (folder / VOCABULARY).exists():
        got = f"a checkpoint of model.family={model.get('family')}"
        raise CheckpointError(Problem(str(folder), got, "model=word2vec, glove, fasttext or one_hot"))
    words, counts = read_vocabulary(folder / VOCABULARY)
    weights, names, subwords = checkpoint.weights(), checkpoint.weight_names, None
    if GRAMS in names:
        subwords = Subwords(weights[GRAMS].numpy(), int(model["shortest"]), int(model["longest"]))
    if VECTORS in names:
        matrix = weights[VECTORS].numpy()
    elif "words" in names:
        matrix = composed(words, weights["words"].numpy(), subwords)
    else:
        matrix = np.eye(len(words), dtype=np.float32)
    if "contexts" in names:  # GloVe's vectors are the sums of both (Pennington et al. 2014, section 4.2)
        matrix = matrix + weights["contexts"].numpy()
    if matrix.shape[0] != len(words):
        got = f"{len(matrix):,} vectors of {len(words):,} words"
        raise CheckpointError(Problem(str(folder), got, "one for each word"))
    known = counts if counts.any() else None
    return WordVectors(words, matrix, known, subwords, str(folder))
