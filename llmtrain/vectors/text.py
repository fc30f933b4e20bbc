"""The documents of `data.path`, and the text of a run: its words counted once and encoded to rows of the
vocabulary in a file that is mapped, so that the text need not fit in memory.

    RUN/words/
      vocabulary.tsv   words and counts
      text.i32         rows of words, int32; BORDER between documents
      facts.json       what they were made of, and their checksums; written last
"""

from __future__ import annotations

import re
import tempfile
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from itertools import repeat
from pathlib import Path
from typing import Any

import numpy as np

from llmtrain import files
from llmtrain.config import encode
from llmtrain.corpus.config import TokenDataConfig
from llmtrain.corpus.corpora import open_corpora
from llmtrain.corpus.manifest import MANIFEST_NAME
from llmtrain.corpus.token_split import TokenSplit
from llmtrain.errors import DataError, Problem
from llmtrain.files import expand_home
from llmtrain.prepare.clean import CleanCounts
from llmtrain.prepare.read import read_part, undecodable
from llmtrain.prepare.remote import local_copy
from llmtrain.prepare.source_file import SourceFile
from llmtrain.prepare.sources import find_files, plan_units
from llmtrain.reading import parse_object, read_bytes
from llmtrain.vectors.config import TextsConfig, VocabularyKeys
from llmtrain.vectors.phrases import join_phrases
from llmtrain.vectors.vocabulary import VOCABULARY, WordCounts, read_vocabulary, words_of, write_vocabulary

TEXT, FACTS = "text.i32", "facts.json"
BORDER, RARE = -1, -2
"""Between documents; in the place of a word that is too rare, where phrases are still to be found."""
VERSION = 1
FACTS_BYTES = 1 << 20
PIECE_TOKENS = 1 << 20
Say = Callable[[str], None]


@dataclass(frozen=True)
class Text:
    """A vocabulary, and a text as rows of it."""

    words: list[str]
    counts: np.ndarray
    """(words,) int64."""
    tokens: np.ndarray
    """int32, mapped; BORDER between documents."""
    fingerprint: str
    """Of the vocabulary and the tokens."""
    vocabulary_file: Path

    @property
    def num_words(self) -> int:
        """The words of the text that are in the vocabulary."""
        return int(self.counts.sum())


def open_text(data: TextsConfig, model: VocabularyKeys, folder: Path, say: Say) -> Text:
    """Return the text of a run, made anew in `folder` unless it holds that of the same files and settings.

    Raise DataError for what cannot be read, and for a vocabulary without a word."""
    opened = _Source.of(data)
    made_of = {
        "version": VERSION,
        "source": opened.stamp,
        "data": {key: value for key, value in encode(data).items() if key != "path"},
        "vocabulary": {key: encode(getattr(model, key)) for key in VocabularyKeys.__dataclass_fields__},
    }
    held = _held(folder, made_of)
    if held is None:
        _make(opened, data, model, folder, made_of, say)
        held = _held(folder, made_of)
        assert held is not None, "it was just written"
    words, counts = read_vocabulary(folder / VOCABULARY)
    tokens = np.memmap(folder / TEXT, np.int32, mode="r")
    return Text(words, counts, tokens, held, folder / VOCABULARY)


def _held(folder: Path, made_of: Mapping[str, Any]) -> str | None:
    """Return the fingerprint of the text that the folder holds; None unless it is whole and made of this."""
    try:
        facts = parse_object(read_bytes(folder / FACTS, FACTS_BYTES))
        sizes = {name: (folder / name).stat().st_size for name in (VOCABULARY, TEXT)}
        if facts.get("made_of") != made_of or facts.get("sizes") != sizes:
            return None
        same = all(files.checksum(folder / name) == facts["checksums"][name] for name in sizes)
        return str(facts["fingerprint"]) if same else None
    except (OSError, ValueError, KeyError, TypeError):
        return None


def _make(
    source: _Source,
    data: TextsConfig,
    model: VocabularyKeys,
    folder: Path,
    made_of: Mapping[str, Any],
    say: Say,
) -> None:
    pattern = re.compile(data.pattern)
    folder.mkdir(parents=True, exist_ok=True)
    (folder / FACTS).unlink(missing_ok=True)
    say(f"counting the words of {source.name}")
    counter = WordCounts(data.most_words)
    for document in source.documents(data):
        counter.add(words_of(document, pattern, data.lower))
    if not counter.total:
        got, allowed = f"no word in {source.name}", f"text in which data.pattern={data.pattern} finds words"
        raise DataError(Problem("data.path", got, allowed, "check data.path and data.text_field"))
    if counter.forgotten_up_to >= model.min_count:
        got = f"{data.most_words:,}: words seen up to {counter.forgotten_up_to} times were forgotten"
        say(f"warning: data.most_words={got}")
    words, counts = counter.vocabulary(model.min_count, model.max_words)
    share = counts.sum() / counter.total
    say(
        f"{counter.total:,} words, {len(counter.counts):,} different; "
        f"{len(words):,} with a count of {int(counts[-1]):,} or more, {share:.1%} of the text"
    )
    with files.atomic_writer(folder / TEXT) as file:
        for piece in _encoded(source, data, pattern, words, keep_rare=model.phrases > 0):
            file.write(piece.tobytes())
    for number in range(model.phrases):
        is_last, threshold = number == model.phrases - 1, model.phrase_threshold
        words, counts = join_phrases(
            folder / TEXT, words, counts, model.min_count, threshold, is_last=is_last
        )
        joined = sum("_" in word for word in words)
        say(f"phrases: {joined:,} of {len(words):,} words are joined ones")
    write_vocabulary(folder / VOCABULARY, words, counts)
    checksums = {name: files.checksum(folder / name) for name in (VOCABULARY, TEXT)}
    facts = {
        "made_of": made_of,
        "sizes": {name: (folder / name).stat().st_size for name in checksums},
        "checksums": checksums,
        "fingerprint": files.checksum_of_json(checksums),
        "words_read": counter.total,
    }
    files.write_json_atomically(folder / FACTS, facts)


def _encoded(
    source: _Source, data: TextsConfig, pattern: re.Pattern[str], words: list[str], *, keep_rare: bool
) -> Iterator[np.ndarray]:
    """Yield the text as rows of the vocabulary, in pieces; rare words are RARE, or left out."""
    row_of = {word: row for row, word in enumerate(words)}.get
    held: list[np.ndarray] = []
    size = 0
    border = np.array([BORDER], np.int32)
    for document in source.documents(data):
        found = words_of(document, pattern, data.lower)
        rows = np.fromiter(map(row_of, found, repeat(RARE)), np.int32, len(found))
        held += [rows if keep_rare else rows[rows != RARE], border]
        size += len(found) + 1
        if size >= PIECE_TOKENS:
            yield np.concatenate(held)
            held, size = [], 0
    if held:
        yield np.concatenate(held)


@dataclass(frozen=True)
class _Source:
    """Where the documents come from."""

    name: str
    stamp: list[Any]
    """Changes with the files, as JSON."""
    found: list[SourceFile]
    corpus: str | None = None

    @classmethod
    def of(cls, data: TextsConfig) -> _Source:
        """Find the files. Raise DataError if there are none."""
        first = data.path[0]
        if len(data.path) == 1 and (expand_home(first) / MANIFEST_NAME).is_file():
            corpora = open_corpora(TokenDataConfig(path=first))
            fingerprint = corpora.fingerprint
            corpora.close()
            return cls(first, [fingerprint], [], first)
        found, _ = find_files(data.path)
        name = found[0].name if len(found) == 1 else f"{len(found):,} files"
        stamp = [[str(file.path), file.url, file.version, file.size, file.mtime_ns] for file in found]
        return cls(name, stamp, found)

    def documents(self, data: TextsConfig) -> Iterator[str]:
        """Yield the texts in order. Raise DataError for what cannot be read."""
        if self.corpus is not None:
            yield from _of_corpus(self.corpus)
            return
        counts = CleanCounts()
        with tempfile.TemporaryDirectory(prefix="llmtrain-words-") as folder:
            for unit in plan_units(self.found, data.txt_document):
                for wanted in unit:
                    with local_copy(wanted, Path(folder)) as part:
                        try:
                            batches = read_part(
                                part,
                                (data.text_field,),
                                data.txt_document,
                                Path(folder),
                                None,
                                counts,
                                data.quoting,
                            )
                            for batch in batches:
                                for text in batch:
                                    yield text.decode() if isinstance(text, bytes) else str(text)
                        except UnicodeDecodeError as error:
                            raise undecodable(part) from error


def _of_corpus(path: str) -> Iterator[str]:
    """Yield the training documents of a corpus of `llmtrain prepare`, decoded."""
    corpora = open_corpora(TokenDataConfig(path=path))
    try:
        tokenizer = corpora.load_tokenizer()
        for split in corpora.splits("train").values():
            for ids in _documents_of(split):
                yield tokenizer.decode([i for i in ids.tolist() if i != corpora.eos_id])
    finally:
        corpora.close()


def _documents_of(split: TokenSplit) -> Iterator[np.ndarray]:
    """Yield the ids of each document, whatever the pieces that are read."""
    begun: list[np.ndarray] = []
    for start in range(0, split.num_tokens, PIECE_TOKENS):
        tokens, ends = split.read(start, min(start + PIECE_TOKENS, split.num_tokens))
        at = 0
        for end in ends.tolist():
            yield np.concatenate([*begun, tokens[at:end]])
            begun, at = [], end
        if at < len(tokens):
            begun.append(tokens[at:])
    if begun:
        yield np.concatenate(begun)
