"""The manifest of a corpus, manifest.json, and the names of the files beside it."""

from __future__ import annotations

import hashlib
import re
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any, Literal

from llmtrain.config import require, show
from llmtrain.errors import DataError, Problem
from llmtrain.files import checksum_of_json
from llmtrain.reading import decode_file, parse_object

FORMAT = "llmtrain-corpus"
VERSION = 3
READABLE = (1, 2, 3)
"""Version 1 lacks lengths.npy, version 2 the manifest's own checksum."""
MANIFEST_NAME = "manifest.json"
MANIFEST_BYTES = 64 << 20
"""Most bytes of a manifest; 300,000 tar files take less."""
MANIFEST_VALUES = 4_000_000
STAMP_NAME = ".verified.json"
UNFINISHED_NAME = ".prepare"
"""Folder in which `llmtrain prepare` keeps its work until the corpus is whole."""
PREPARE_AGAIN = "prepare the corpus again with llmtrain prepare, or copy it again"
_FILE = re.compile(r"[\w+-][\w+.-]*(/[\w+-][\w+.-]*)*", re.ASCII)
"""A relative path without characters that a shell, a URL or a library could read as anything else; prepare
writes only such paths."""
_XXH3 = re.compile(r"[0-9a-f]{32}")
_SHA256 = re.compile(r"[0-9a-f]{64}")
_FINGERPRINT = re.compile(r"[0-9a-f]{32,64}")


@dataclass(frozen=True)
class TokenizerEntry:
    """The tokenizer of a corpus."""

    file: str
    sha256: str
    special_ids: Mapping[str, int] = field(default_factory=dict)
    """Role → id, as in the tokenizer; empty in corpora of early versions, which did not record them."""
    sentinel_ids: tuple[int, ...] = ()
    """The ids of <extra_id_0>, <extra_id_1>, …"""

    def problems(self) -> Iterator[Problem]:
        yield from _require_file("file", self.file)
        yield from require(bool(_SHA256.fullmatch(self.sha256)), "sha256", self.sha256, "64 hex digits")


@dataclass(frozen=True)
class TarFileEntry:
    """A tar file of a split."""

    file: str
    """Path relative to the location of the corpus."""
    bytes: int
    xxh3_128: str
    num_samples: int
    num_tokens: int
    num_documents: int

    def problems(self) -> Iterator[Problem]:
        yield from _require_file("file", self.file)
        yield from _require_xxh3("xxh3_128", self.xxh3_128)
        yield from _require_counts(self, "bytes", "num_samples", "num_tokens", "num_documents")


@dataclass(frozen=True)
class SplitEntry:
    """A split: train, validation, …"""

    num_tokens: int
    """Token ids, end-of-document ids included."""
    num_documents: int
    num_bytes: int
    """UTF-8 bytes of the documents' text."""
    num_samples: int
    index: str
    index_xxh3_128: str
    shards: tuple[TarFileEntry, ...]
    lengths: str | None = None
    """File with the number of tokens of each document; None in corpora of version 1."""
    lengths_xxh3_128: str | None = None

    def problems(self) -> Iterator[Problem]:
        yield from _require_file("index", self.index)
        yield from _require_xxh3("index_xxh3_128", self.index_xxh3_128)
        if self.lengths is not None:
            yield from _require_file("lengths", self.lengths)
            yield from _require_xxh3("lengths_xxh3_128", self.lengths_xxh3_128)
        yield from _require_counts(self, "num_tokens", "num_documents", "num_bytes", "num_samples")
        for name in ("num_tokens", "num_documents", "num_samples"):
            together = sum(getattr(tar, name) for tar in self.shards)
            yield from require(
                getattr(self, name) == together,
                name,
                getattr(self, name),
                f"{together}, the sum over its tar files",
            )

    @property
    def has_text(self) -> bool:
        """Whether there is any token besides the end-of-document ids."""
        return self.num_tokens > self.num_documents


@dataclass(frozen=True)
class Manifest:
    """The part of manifest.json that a reader needs."""

    vocab_size: int
    eos_id: int
    """The id that ends each document."""
    dtype: Literal["uint16", "uint32"]
    tokenizer: TokenizerEntry
    fingerprint: str
    """Hex; changes with any token and with the tokenizer."""
    splits: Mapping[str, SplitEntry]
    paired: bool = False
    """Documents alternate between sources and targets; both of a pair are in the same tar file."""

    def problems(self) -> Iterator[Problem]:
        most = 1 << (16 if self.dtype == "uint16" else 32)
        fits = 1 <= self.vocab_size <= most
        yield from require(fits, "vocab_size", self.vocab_size, f"1 to {most:,}, which {self.dtype} holds")
        ids = {"eos_id": self.eos_id}
        ids |= {f"tokenizer.special_ids.{role}": i for role, i in self.tokenizer.special_ids.items()}
        ids |= {f"tokenizer.sentinel_ids[{n}]": i for n, i in enumerate(self.tokenizer.sentinel_ids)}
        for name, i in ids.items():
            yield from require(0 <= i < self.vocab_size, name, i, f"0 to {self.vocab_size - 1}")
        is_hex = bool(_FINGERPRINT.fullmatch(self.fingerprint))
        yield from require(is_hex, "fingerprint", self.fingerprint, "32 to 64 hex digits")
        for name in self.splits:
            yield from require(bool(_FILE.fullmatch(name)), "splits", name, "names of letters and digits")


def _require_file(where: str, name: str) -> Iterator[Problem]:
    yield from require(bool(_FILE.fullmatch(name)), where, name, "a file of the corpus' own folder")


def _require_xxh3(where: str, digits: str | None) -> Iterator[Problem]:
    yield from require(bool(digits and _XXH3.fullmatch(digits)), where, digits, "32 hex digits")


def _require_counts(entry: Any, *names: str) -> Iterator[Problem]:
    for name in names:
        yield from require(getattr(entry, name) >= 0, name, getattr(entry, name), "0 or more")


def parse_manifest(content: bytes, where: str) -> Manifest:
    """Return the manifest in `content`.

    where: its name in messages. Raises DataError for anything but a manifest of a readable version.
    """
    try:
        raw = parse_object(content, most=MANIFEST_VALUES)
    except ValueError as error:
        raise DataError(Problem(where, str(error), "a corpus manifest", PREPARE_AGAIN)) from None
    if raw.get("format") != FORMAT:
        raise DataError(
            Problem(where, f"format {show(raw.get('format'))}", FORMAT, "give the folder of a corpus")
        )
    if raw.get("version") not in READABLE or isinstance(raw["version"], bool):
        remedy = "prepare the corpus again with this llmtrain, or use the version of llmtrain that wrote it"
        got = f"version {show(raw.get('version'))}"
        allowed = f"version {', '.join(map(str, READABLE))}"
        raise DataError(Problem(where, got, allowed, remedy))
    # Version 2 has no checksum; a manifest with one whose version says 2 was altered.
    if (raw["version"] > 2 or "checksum" in raw) and raw.get("checksum") != checksum_of_json(raw):
        got = "an altered manifest: it does not match its own checksum"
        raise DataError(Problem(where, got, "what was written", PREPARE_AGAIN))
    manifest = decode_file(Manifest, raw, where, DataError)
    checksums = (tar.xxh3_128 for split in manifest.splits.values() for tar in split.shards)
    if raw["version"] > 2 and manifest.fingerprint != fingerprint_of(checksums, manifest.tokenizer.sha256):
        got = f"the fingerprint {manifest.fingerprint[:12]}… of another corpus"
        raise DataError(Problem(where, got, "that of its tar files and its tokenizer", PREPARE_AGAIN))
    return manifest


def fingerprint_of(checksums: Iterable[str], tokenizer_sha256: str) -> str:
    """Return the hash, in hex, of the checksums of all tar files of all splits, in order, and the
    tokenizer's."""
    return hashlib.sha256("\n".join([*checksums, tokenizer_sha256]).encode()).hexdigest()
