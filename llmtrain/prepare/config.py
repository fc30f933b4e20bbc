"""What `llmtrain prepare` can be told. Free of torch and of everything heavy."""

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
    """Shares of the documents held out; a hash of the document alone decides where it goes."""

    validation: float = 0.05
    """Share of the documents in the validation split."""
    test: float = 0.05
    """Share of the documents in the test split."""

    def problems(self) -> Iterator[Problem]:
        for name in ("validation", "test"):
            share = getattr(self, name)
            yield from require(0.0 <= share < 1.0, name, share, "0 up to, not including, 1")
        yield from require(
            self.validation + self.test < 1.0,
            "validation",
            self.validation,
            f"less than 1 together with test={self.test}",
            "leave something to train on",
        )


@dataclass(frozen=True)
class NearDuplicatesConfig:
    """Documents nearly the same as an earlier one go (MinHash; needs the extra `filters`)."""

    threshold: float | None = None
    """Share of its runs of words that a document shares with an earlier one (Jaccard's measure, estimated);
    null: only exact duplicates go."""
    shingle_words: int = 5
    """Words in one of these runs."""

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
    """Which documents are kept for their contents; those that come as token ids all are. Languages need the
    extra `filters`."""

    languages: tuple[str, ...] = ()
    """ISO 639-1 codes of the languages to keep; none: all."""
    language_confidence: float = 0.5
    """Least probability of the language that is found."""
    quality: Literal["gopher"] | None = None
    """Rules for web text in English (Rae et al. 2021, arXiv:2112.11446, section A.1)."""

    def problems(self) -> Iterator[Problem]:
        yield from require(
            0.0 <= self.language_confidence <= 1.0,
            "language_confidence",
            self.language_confidence,
            "0 to 1",
        )


@dataclass(frozen=True)
class PrepareConfig:
    """Raw text → tokenizer and sharded corpus."""

    source: tuple[str, ...]
    """Files, folders with all below, globs, package:NAME/path (a file of an installed Python package),
    URLs of files."""
    output: Path
    """The corpus' folder."""
    text_field: str = "text"
    """Column or key that holds the text, in .jsonl, .csv, .tsv, .parquet and the .json members of a .tar."""
    target_field: str | None = None
    """Of pairs: column or key of the target, `text_field` being the source's; null: texts are no pairs."""
    target_source: tuple[str, ...] = ()
    """Of pairs in plain files: for each of `source` in turn the file whose lines are the targets of its
    lines."""
    txt_document: Literal["auto", "file", "line", "paragraph"] = "auto"
    """What is a document in .txt; auto: consecutive paragraphs, about 4 KiB together."""
    quoting: Literal["auto", "double", "none"] = "auto"
    """What quotes mean in tables. double: they enclose values that hold delimiters, line ends or quotes, and
    these are doubled. none: they are text. auto: double in .csv, none in .tsv."""
    normalization: Literal["none", "nfc", "nfkc"] = "nfc"
    """Unicode normalization form (Unicode Standard Annex 15)."""
    near_duplicates: NearDuplicatesConfig = field(default_factory=NearDuplicatesConfig)
    filters: FiltersConfig = field(default_factory=FiltersConfig)
    tokenizer: TokenizerConfig = field(default_factory=TokenizerConfig)
    split: SplitConfig = field(default_factory=SplitConfig)
    sample_tokens: int = 1 << 18
    """About how many tokens one member of a tar file holds; a member holds whole documents."""
    shard_bytes: int = 64 << 20
    """About how many bytes one tar file has."""
    workers: int | None = None
    """Workers of each process that is launched; null: one a core. The result does not depend on it."""
    peer_timeout: float = 600.0
    """Seconds that the processes of one job wait for a sign of life of each other."""
    seed: int = 0
    """Seed of the choice of documents that the tokenizer is trained on."""
    overwrite: bool = False
    """Replace a corpus of other sources or settings that stands in the output folder."""

    @property
    def is_paired(self) -> bool:
        """Whether what is read are pairs, of a source and its target."""
        return self.target_field is not None or bool(self.target_source)

    @property
    def fields(self) -> tuple[str, ...]:
        """Names of the columns or keys that are read."""
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
            "line with target_source: a line is a text",
        )
        yield from require(
            self.workers is None or self.workers >= 1, "workers", self.workers, "1 or more, or null"
        )
        yield from require(self.peer_timeout > 0, "peer_timeout", self.peer_timeout, "over 0 seconds")
        yield from require(
            1 <= self.sample_tokens <= 1 << 30, "sample_tokens", self.sample_tokens, f"1 to {1 << 30}"
        )
        yield from require(self.shard_bytes >= 1, "shard_bytes", self.shard_bytes, "1 or more")
        yield from require(0 <= self.seed < 1 << 63, "seed", self.seed, "0 up to, not including, 2^63")
