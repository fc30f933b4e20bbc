"""`llmtrain vectors VERB CHECKPOINT`: ask word vectors, judge them, map them, and take them in and out."""

from __future__ import annotations

import json
import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np

from llmtrain import files
from llmtrain.config import decode, require
from llmtrain.corpus.packages import resolve_package_path
from llmtrain.errors import ConfigError, DataError, Problem
from llmtrain.interchange.word_vectors import read_vectors
from llmtrain.standard_streams import print_note, print_text
from llmtrain.vectors.files_in import FileFormat, facts, read_file
from llmtrain.vectors.files_out import WrittenFormat, write_file
from llmtrain.vectors.keyed import WordVectors


@dataclass(frozen=True)
class VectorsConfig:
    checkpoint: Path
    """A run folder of word vectors, a checkpoint folder, or a file of vectors."""


def _print_json(value: Mapping[str, Any]) -> None:
    print(json.dumps(_finite(value), ensure_ascii=False))


def _finite(value: Any) -> Any:
    """Return the value with null in place of numbers that JSON does not have."""
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    if isinstance(value, Mapping):
        return {key: _finite(each) for key, each in value.items()}
    return [_finite(each) for each in value] if isinstance(value, (list, tuple)) else value


# nearest


@dataclass(frozen=True)
class NearestConfig(VectorsConfig):
    word: tuple[str, ...]
    """The word, or several in a list, each of which is asked."""
    top: int = 10
    """Number of nearest words."""
    format: Literal["text", "json"] = "text"
    """text: a line for each word; json: one object."""

    def problems(self) -> Iterator[Problem]:
        if not self.word:
            yield Problem("word", "nothing", "a word, or a list of words")
        yield from require(self.top >= 1, "top", self.top, "1 or more")


def nearest(mapping: Mapping[str, Any]) -> None:
    """Print the words whose vectors have the largest cosine with that of a word.

    Raise DataError, which names similar words, for one without a vector."""
    config = decode(NearestConfig, mapping)
    vectors = read_vectors(config.checkpoint)
    _refuse_unknown(vectors, {f"word={word}": word for word in config.word})
    found = {word: vectors.nearest(vectors.vector(word), config.top, [word]) for word in config.word}
    if config.format == "json":
        answers = [{"word": word, "nearest": _pairs(near)} for word, near in found.items()]
        _print_json(
            {"checkpoint": vectors.source, **(answers[0] if len(answers) == 1 else {"words": answers})}
        )
        return
    for word, near in found.items():
        if len(found) > 1:
            print_text(word)
        _print_near(near)


def _pairs(near: Sequence[tuple[str, float]]) -> list[dict[str, Any]]:
    return [{"word": word, "similarity": similarity} for word, similarity in near]


def _print_near(near: Sequence[tuple[str, float]]) -> None:
    for word, similarity in near:
        print_text(f"{similarity:.4f}  {word}")


def _refuse_unknown(vectors: WordVectors, words: Mapping[str, str]) -> None:
    problems = [vectors.unknown(word, key) for key, word in words.items() if word not in vectors]
    if problems:
        raise DataError(problems)


def _one_question(asked: AnalogyConfig | SimilarityConfig, count: int, remedy: str) -> Iterator[Problem]:
    """Yield a problem unless there is either a file or `count` words."""
    if (asked.file is None) == (not asked.words):
        got = "neither" if asked.file is None else "both"
        yield Problem("file and words", got, "one of them", remedy)
    elif asked.words and len(asked.words) != count:
        yield Problem("words", f"{len(asked.words)} words", str(count), remedy)


# analogy


@dataclass(frozen=True)
class AnalogyConfig(VectorsConfig):
    file: str | None = None
    """Questions in the form of questions-words.txt: four words on each line, below lines `: SECTION`; also
    package:NAME/path."""
    words: tuple[str, ...] = ()
    """In place of a file, three words a, b, c: which word is to c as b is to a?"""
    among: int | None = 300_000
    """Most frequent words among which the answer to a question of a file is looked for; null: all."""
    top: int = 10
    """Number of answers to three words."""
    format: Literal["text", "json"] = "text"
    """text: lines for people; json: one object."""

    def problems(self) -> Iterator[Problem]:
        yield from _one_question(self, 3, "give file=questions-words.txt, or words=[man,king,woman]")
        yield from require(self.top >= 1, "top", self.top, "1 or more")
        yield from require(self.among is None or self.among >= 1, "among", self.among, "1 or more, or null")


def analogy(mapping: Mapping[str, Any]) -> None:
    """Print the accuracy on the analogies of a file, or the answers to one of three words.

    Raise DataError for a file of another form, or words without vectors."""
    from llmtrain.vectors.questions import judge_analogies, read_analogies, total

    config = decode(AnalogyConfig, mapping)
    vectors = read_vectors(config.checkpoint)
    if config.file is None:
        a, b, c = config.words
        _refuse_unknown(vectors, {f"words: {word}": word for word in config.words})
        near = vectors.analogy(a, b, c, config.top)
        if config.format == "json":
            _print_json({"checkpoint": vectors.source, "words": [a, b, c], "nearest": _pairs(near)})
        else:
            _print_near(near)
        return
    path = resolve_package_path(config.file)
    scores = judge_analogies(vectors, read_analogies(path), config.among)
    whole = total(scores)
    if not whole.asked:
        got = f"no question of {whole.skipped:,} whose words are among {len(vectors.words):,} vectors"
        raise DataError(Problem(str(path), got, "one or more", "give vectors of a larger text"))
    if config.format == "json":
        rows = {name: {**score._asdict(), "accuracy": score.accuracy} for name, score in scores.items()}
        _print_json(
            {
                "checkpoint": vectors.source,
                "file": str(path),
                "accuracy": whole.accuracy,
                **whole._asdict(),
                "sections": rows,
            }
        )
        return
    width = max(map(len, scores))
    for name, score in [*scores.items(), ("all", whole)]:
        share = f"{score.accuracy:7.2%}" if score.asked else "      –"
        skipped = f", {score.skipped:,} skipped" if score.skipped else ""
        print_text(f"{name:<{width}}  {share}  {score.right:,} of {score.asked:,}{skipped}")


# similarity


@dataclass(frozen=True)
class SimilarityConfig(VectorsConfig):
    file: str | None = None
    """Pairs of words with scores of people, such as WordSim-353 or SimLex-999; also package:NAME/path."""
    words: tuple[str, ...] = ()
    """In place of a file, two words, whose cosine is printed."""
    format: Literal["text", "json"] = "text"
    """text: lines for people; json: one object."""

    def problems(self) -> Iterator[Problem]:
        yield from _one_question(self, 2, "give file=wordsim353.tsv, or words=[good,great]")


def similarity(mapping: Mapping[str, Any]) -> None:
    """Print Spearman's ρ between the cosines of a file's pairs and people's scores, or the cosine of two
    words.

    Raise DataError for a file of another form, or words without vectors."""
    from llmtrain.vectors.questions import judge_similarity, read_pairs

    config = decode(SimilarityConfig, mapping)
    vectors = read_vectors(config.checkpoint)
    if config.file is None:
        _refuse_unknown(vectors, {f"words: {word}": word for word in config.words})
        value = vectors.similarity(*config.words)
        if config.format == "json":
            _print_json({"checkpoint": vectors.source, "words": list(config.words), "similarity": value})
        else:
            print(f"{value:.4f}")
        return
    path = resolve_package_path(config.file)
    found = judge_similarity(vectors, read_pairs(path), str(path))
    if config.format == "json":
        _print_json({"checkpoint": vectors.source, "file": str(path), **found.facts()})
        return
    low, high = found.interval
    print(f"Spearman's ρ {found.rho:.4f} ({low:.4f} to {high:.4f}), Pearson's r {found.pearson:.4f}")
    print(f"{found.used:,} pairs, {len(found.skipped):,} skipped for a word without a vector")


# map


@dataclass(frozen=True)
class MapConfig(VectorsConfig):
    output: Path
    """The picture, a .png."""
    method: Literal["pca", "tsne"] = "pca"
    """pca: principal components; tsne: neighbours stay neighbours (van der Maaten and Hinton 2008)."""
    words: tuple[str, ...] = ()
    """Words to show; none: the `top` most frequent ones."""
    top: int = 200
    """Number of the most frequent words, if no words are given."""
    perplexity: float = 20.0
    """Neighbours of a word that t-SNE looks at."""
    projector: Path | None = None
    """Folder for the files of TensorBoard's projector, with all words; null: none."""

    def problems(self) -> Iterator[Problem]:
        from llmtrain.vectors.maps import MOST_TSNE

        if self.output.suffix != ".png":
            yield Problem("output", str(self.output), "a name that ends with .png")
        most = MOST_TSNE if self.method == "tsne" else 100_000
        count = len(self.words) or self.top
        where = "words" if self.words else "top"
        yield from require(3 <= count <= most, where, count, f"3 to {most:,} words with method={self.method}")
        if len(set(self.words)) < len(self.words):
            yield Problem("words", "a word twice", "different words")
        allowed = "1 up to the number of words"
        yield from require(1 <= self.perplexity < max(count, 2), "perplexity", self.perplexity, allowed)


def map_(mapping: Mapping[str, Any]) -> None:
    """Draw words in two dimensions, and write the files of TensorBoard's projector.

    Raise DataError for words without vectors, and if a file cannot be written."""
    from llmtrain.vectors import maps

    config = decode(MapConfig, mapping)
    vectors = read_vectors(config.checkpoint)
    words = list(config.words or vectors.words[: config.top])
    if len(words) < 3:
        got = f"{len(words)} words"
        raise DataError(Problem(str(config.checkpoint), got, "3 or more, to be drawn", "give other vectors"))
    _refuse_unknown(vectors, {f"words: {word}": word for word in words})
    matrix = np.stack([vectors.vector(word) for word in words])
    if config.method == "pca":
        at = maps.principal_components(matrix)
    else:
        at = maps.tsne(matrix, min(config.perplexity, (len(words) - 1) / 3))
    if at.shape[1] < 2:
        at = np.hstack([at, np.zeros_like(at)])
    try:
        title = f"{len(words):,} words, {'principal components' if config.method == 'pca' else 't-SNE'}"
        files.write_atomically(config.output, maps.draw(words, at, title))
        print_note(f"wrote {config.output}")
        if config.projector is not None:
            maps.write_projector(config.projector, vectors.words, vectors.matrix)
            print_note(f"wrote {config.projector}: tensorboard --logdir {config.projector}")
    except OSError as error:
        raise DataError(files.disk_problem(error, config.output, key="output")) from error


# export


@dataclass(frozen=True)
class ExportConfig(VectorsConfig):
    output: Path
    """The file."""
    format: WrittenFormat = "text"
    """text and binary: those of word2vec, which most programs read; gensim: what KeyedVectors.load reads."""
    top: int | None = None
    """Most words, the most frequent ones; null: all."""
    overwrite: bool = False
    """Replace a file of this name."""
    report: Literal["text", "json"] = "text"
    """Form of what is said at the end."""

    def problems(self) -> Iterator[Problem]:
        yield from require(self.top is None or self.top >= 1, "top", self.top, "1 or more, or null")


def export(mapping: Mapping[str, Any]) -> None:
    """Write vectors to a file. Raise DataError if it exists, or cannot be written."""
    config = decode(ExportConfig, mapping)
    _refuse_existing(config.output, config.overwrite)
    vectors = read_vectors(config.checkpoint)
    kept = WordVectors(
        vectors.words[: config.top],
        vectors.matrix[: config.top],
        None if vectors.counts is None else vectors.counts[: config.top],
        None,
        vectors.source,
    )
    write_file(kept, config.output, config.format)
    said = {**facts(kept), "output": str(config.output), "format": config.format}
    said["bytes"] = config.output.stat().st_size
    if config.report == "json":
        _print_json(said)
        return
    size = f"{said['bytes']:,} bytes"
    print_text(f"{len(kept.words):,} words × {kept.dimensions:,} dimensions → {config.output}, {size}")
    if vectors.subwords is not None:
        print_note("note: the form has no n-grams: words that were never seen have no vector in it")


def _refuse_existing(output: Path, overwrite: bool) -> None:
    if output.exists() and not overwrite:
        remedy = "give another output=…, or overwrite=true"
        raise ConfigError(Problem("output", f"{output}, which exists", "a new name", remedy))


# import


@dataclass(frozen=True)
class ImportConfig:
    input: Path
    """A file of vectors: word2vec's text or binary form, GloVe's text, fastText's .vec or .bin, gensim's
    KeyedVectors."""
    output: Path
    """Folder of the checkpoint, which all verbs of `llmtrain vectors` and recurrent models read."""
    form: FileFormat = "auto"
    """Form of the file; auto: as its beginning says."""
    overwrite: bool = False
    """Replace a folder of this name that an earlier import wrote."""
    format: Literal["text", "json"] = "text"
    """Form of what is said at the end."""


def import_(mapping: Mapping[str, Any]) -> None:
    """Make a checkpoint of a file of vectors. Raise DataError for a file of another form."""
    from llmtrain.train.vectors_store import import_vectors

    config = decode(ImportConfig, mapping)
    vectors = read_file(files.expand_home(config.input), config.form)
    path = import_vectors(vectors, files.expand_home(config.output), str(config.input), config.overwrite)
    said = {**facts(vectors), "output": str(path)}
    if config.format == "json":
        _print_json(said)
    else:
        grams = f", {said['subwords']:,} n-grams" if said["subwords"] else ""
        print_text(f"{len(vectors.words):,} words × {vectors.dimensions:,} dimensions{grams} → {path}")
