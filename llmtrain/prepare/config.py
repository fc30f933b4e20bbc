"""Configuration of `llmtrain prepare`. Does not import torch or other heavy packages."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

from llmtrain.config import require
from llmtrain.errors import Problem
from llmtrain.tokenizers.config import TokenizerConfig


@dataclass(frozen=True)
class SplitConfig:
    """Shares of the documents held out for validation and test. The split of a document depends only on a
    hash of its text."""

    validation: float = 0.05
    """Share of the documents in the validation split, 0 to 1."""
    test: float = 0.05
    """Share of the documents in the test split, 0 to 1."""

    def problems(self) -> Iterator[Problem]:
        for name in ("validation", "test"):
            share = getattr(self, name)
            yield from require(0.0 <= share < 1.0, name, share, "0 up to, not including, 1")
        yield from require(
            self.validation + self.test < 1.0,
            "validation",
            self.validation,
            f"less than 1 together with test={self.test}",
            "leave documents to train on",
        )


@dataclass(frozen=True)
class NearDuplicatesConfig:
    """Removal of documents that are nearly equal to an earlier one, by MinHash. Needs the extra `filters`."""

    threshold: float | None = None
    """Jaccard similarity of the shingles of two documents, 0.1 to 1, from which on the later one is dropped;
    estimated from 128 MinHash values. null: drop only exact duplicates."""
    shingle_words: int = 5
    """Number of consecutive words in a shingle."""

    def problems(self) -> Iterator[Problem]:
        yield from require(
            self.threshold is None or 0.1 <= self.threshold <= 1.0,
            "threshold",
            self.threshold,
            "0.1 to 1, or null",
        )
        yield from require(1 <= self.shingle_words <= 64, "shingle_words", self.shingle_words, "1 to 64")


@dataclass(frozen=True)
class FiltersConfig:
    """Removal of documents by language and text quality. Documents that are given as token ids are always
    kept."""

    languages: tuple[str, ...] = ()
    """ISO 639-1 codes of the languages to keep; empty: all. Needs the extra `filters`."""
    language_confidence: float = 0.5
    """Lowest probability of the detected language, 0 to 1, at which a document is kept."""
    quality: Literal["gopher"] | None = None
    """Quality rules that documents must pass. gopher: rules for English web text (Rae et al. 2021,
    arXiv:2112.11446, section A.1); null: none."""

    def problems(self) -> Iterator[Problem]:
        yield from require(
            0.0 <= self.language_confidence <= 1.0,
            "language_confidence",
            self.language_confidence,
            "0 to 1",
        )


@dataclass(frozen=True)
class PrepareConfig:
    """Preparation of a corpus: raw text → tokenizer and tar files of tokens."""

    source: tuple[str, ...]
    """Files, folders (searched recursively), glob patterns, package:NAME/path (a file of an installed Python
    package), or URLs of files."""
    output: Path
    """Folder of the corpus."""
    text_field: str = "text"
    """Column or key of the text in .jsonl, .csv, .tsv, .parquet and the .json members of a .tar."""
    target_field: str | None = None
    """Column or key of the target text of a pair; `text_field` is that of the source text. null: the
    documents are not pairs."""
    target_source: tuple[str, ...] = ()
    """Files with the target texts of pairs, one for each file of `source`: line n of one belongs to line n of
    the other. Empty: the documents are not pairs of lines."""
    txt_document: Literal["auto", "file", "line", "paragraph"] = "auto"
    """The unit of a .txt file that becomes a document. auto: consecutive paragraphs of about 4 KiB
    together."""
    quoting: Literal["auto", "double", "none"] = "auto"
    """Quotes in .csv and .tsv. double: double quotes enclose values with delimiters, line ends or quotes,
    which are doubled. none: quotes are part of the text. auto: double in .csv, none in .tsv."""
    normalization: Literal["none", "nfc", "nfkc"] = "nfc"
    """Unicode normalization form of the text (Unicode Standard Annex 15)."""
    near_duplicates: NearDuplicatesConfig = field(default_factory=NearDuplicatesConfig)
    filters: FiltersConfig = field(default_factory=FiltersConfig)
    tokenizer: TokenizerConfig = field(default_factory=TokenizerConfig)
    split: SplitConfig = field(default_factory=SplitConfig)
    sample_tokens: int = 1 << 18
    """Approximate number of tokens in a sample, the unit that is read at a time from a tar file. A sample
    holds whole documents."""
    tar_bytes: int = 64 << 20
    """Approximate size of a tar file in bytes."""
    workers: int | None = None
    """Number of worker processes of each launched process; null: one per core. The corpus does not depend on
    it."""
    peer_timeout: float = 600.0
    """Seconds without a heartbeat of another process of the job after which it counts as lost."""
    seed: int = 0
    """Seed of the choice of documents that the tokenizer is trained on."""
    overwrite: bool = False
    """Replace an existing corpus of other sources or settings in the output folder."""

    @property
    def is_paired(self) -> bool:
        """Whether the documents are pairs of a source text and a target text."""
        return self.target_field is not None or bool(self.target_source)

    @property
    def fields(self) -> tuple[str, ...]:
        """Names of the columns or keys to read."""
        return (self.text_field,) if self.target_field is None else (self.text_field, self.target_field)

    def problems(self) -> Iterator[Problem]:
        yield from require(
            len(self.source) > 0, "source", "nothing", "a file, folder, glob or package:NAME/path"
        )
        yield from require(bool(self.text_field), "text_field", self.text_field, "a name")
        yield from require(
            self.target_field not in ("", self.text_field),
            "target_field",
            self.target_field,
            f"another name than text_field={self.text_field}, or null",
        )
        yield from require(
            not self.target_source or self.target_field is None,
            "target_field",
            self.target_field,
            "null with target_source, whose files have no fields",
        )
        yield from require(
            not self.target_source or self.txt_document in ("auto", "line"),
            "txt_document",
            self.txt_document,
            "auto or line with target_source, where each line is a text",
        )
        yield from require(
            self.workers is None or self.workers >= 1, "workers", self.workers, "1 or more, or null"
        )
        yield from require(self.peer_timeout > 0, "peer_timeout", self.peer_timeout, "more than 0 seconds")
        yield from require(
            1 <= self.sample_tokens <= 1 << 30, "sample_tokens", self.sample_tokens, f"1 to {1 << 30}"
        )
        yield from require(self.tar_bytes >= 1, "tar_bytes", self.tar_bytes, "1 or more")
        yield from require(0 <= self.seed < 1 << 63, "seed", self.seed, "0 up to, not including, 2^63")
