"""Read the word vectors of a run, of one of its checkpoints or of a file. Free of torch."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np

from llmtrain import files
from llmtrain.errors import CheckpointError, DataError, Problem
from llmtrain.reading import parse_object, read_bytes
from llmtrain.vectors.config import vectors_config_type
from llmtrain.vectors.files_in import FileFormat, composed, read_file
from llmtrain.vectors.keyed import WordVectors
from llmtrain.vectors.ngrams import Subwords
from llmtrain.vectors.vocabulary import VOCABULARY, read_vocabulary

MANIFEST = "manifest.json"
MANIFEST_BYTES = 16 << 20
WEIGHT = "weight"
VECTORS, GRAMS = "vectors", "grams"
"""Tensors of imports: vectors as their file has them, and those of n-grams."""


def read_vectors(path: Path, form: FileFormat = "auto") -> WordVectors:
    """Return the vectors at `path`: a run folder (its newest checkpoint), a checkpoint folder, or a file in
    any form that `llmtrain vectors import` reads, which `form` names.

    Raise CheckpointError for a folder without word vectors, or one that is damaged, DataError for a file that
    cannot be read.
    """
    path = files.expand_home(path)
    if not path.exists():
        allowed = "a run of model=word2vec, one of its checkpoints, or a file of vectors"
        raise DataError(Problem(str(path), "no such file or folder", allowed, "check the name"))
    return _read_checkpoint(_checkpoint(path)) if path.is_dir() else read_file(path, form)


def read_words_and_matrix(path: Path) -> tuple[list[str], np.ndarray]:
    """Return the words at `path`, as read_vectors finds them, and their vectors, (words, dimensions)
    float32."""
    vectors = read_vectors(path)
    return list(vectors.words), np.asarray(vectors.matrix, dtype=np.float32)


def _checkpoint(path: Path) -> Path:
    """Return a checkpoint folder, or the newest one of a run folder."""
    if (path / MANIFEST).exists():
        return path
    root = path / "checkpoints" if (path / "checkpoints").is_dir() else path
    found = sorted(folder for folder in root.glob("step-*") if (folder / MANIFEST).exists())
    if not found:
        allowed = "a run of model=word2vec, one of its checkpoints, or a file of vectors"
        raise CheckpointError(Problem(str(path), "a folder without a checkpoint", allowed))
    return found[-1]


def _read_checkpoint(folder: Path) -> WordVectors:
    where = str(folder / MANIFEST)
    try:
        manifest = parse_object(read_bytes(folder / MANIFEST, MANIFEST_BYTES))
    except (OSError, ValueError) as error:
        raise CheckpointError(Problem(where, f"an unreadable manifest ({error})")) from None
    if manifest.get("checksum") != files.checksum_of_json(manifest):
        raise CheckpointError(Problem(where, "an altered manifest", "the manifest as it was written"))
    model = manifest.get("model")
    family = model.get("family") if isinstance(model, dict) else None
    is_ours = isinstance(model, dict) and vectors_config_type(model) is not None
    if not is_ours or not (folder / VOCABULARY).exists():
        allowed = "model=word2vec, glove, fasttext or one_hot"
        raise CheckpointError(Problem(str(folder), f"a checkpoint of model.family={family}", allowed))
    _refuse_damage(folder, manifest)
    words, counts = read_vocabulary(folder / VOCABULARY)
    tensors = _Tensors(folder, manifest)
    subwords = None
    if GRAMS in tensors:
        assert isinstance(model, dict)
        subwords = Subwords(tensors.read(GRAMS), int(model["shortest"]), int(model["longest"]))
    if VECTORS in tensors:
        matrix = tensors.read(VECTORS)
    elif "words" in tensors:
        matrix = composed(words, tensors.read("words"), subwords)
    else:
        matrix = np.eye(len(words), dtype=np.float32)
    if "contexts" in tensors:  # GloVe's vectors are the sums of both (Pennington et al. 2014, section 4.2)
        matrix = matrix + tensors.read("contexts")
    if matrix.shape[0] != len(words):
        got = f"{len(matrix):,} vectors of {len(words):,} words"
        raise CheckpointError(Problem(str(folder), got, "one for each word"))
    known = counts if counts.any() else None
    return WordVectors(words, matrix, known, subwords, str(folder))


def _refuse_damage(folder: Path, manifest: dict[str, Any]) -> None:
    for entry in manifest["files"]:
        path = folder / entry["file"]
        if not files.is_inside_path(entry["file"]) or not path.is_file():
            raise CheckpointError(
                Problem(str(path), "no file", "the files that the checkpoint was saved with")
            )
        if files.checksum(path) != entry["xxh3_128"]:
            got, remedy = "another checksum than when it was written", "name another step's folder"
            raise CheckpointError(Problem(str(path), got, "an undamaged checkpoint", remedy))


class _Tensors:
    """The whole tensors of a checkpoint that one process wrote."""

    def __init__(self, folder: Path, manifest: dict[str, Any]) -> None:
        self._folder, self._entries = folder, manifest["tensors"][WEIGHT]

    def __contains__(self, name: str) -> bool:
        return name in self._entries

    def read(self, name: str) -> np.ndarray:
        from safetensors import safe_open

        entry = self._entries[name]
        ((file, key, _),) = entry["boxes"]
        with safe_open(self._folder / file, framework="np") as opened:
            found: np.ndarray = opened.get_tensor(key).reshape(entry["shape"])
        return found
