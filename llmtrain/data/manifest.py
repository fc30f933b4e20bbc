"""What a prepared corpus says of itself: manifest.json, and the names of the files beside it."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any, Literal

from llmtrain.errors import DataError, Problem
from llmtrain.files import stays_inside

FORMAT = "llmtrain-corpus"
VERSION = 2
READABLE = (1, 2)
"""Version 1 lacks lengths.npy."""
MANIFEST_NAME = "manifest.json"
STAMP_NAME = ".verified.json"
UNFINISHED_NAME = ".prepare"
"""Folder in which `llmtrain prepare` keeps its work until the corpus is whole."""
PREPARE_AGAIN = "prepare the corpus again with llmtrain prepare, or copy it again"


@dataclass(frozen=True)
class TokenizerEntry:
    file: str
    sha256: str
    special_ids: Mapping[str, int] = field(default_factory=dict)
    """Role → id, as the tokenizer has them; none in corpora that were prepared before they were noted."""
    sentinel_ids: tuple[int, ...] = ()
    """Of <extra_id_0>, <extra_id_1>, …"""


@dataclass(frozen=True)
class ShardEntry:
    file: str
    """Path from the corpus' folder."""
    bytes: int
    xxh3_128: str
    num_samples: int
    num_tokens: int
    num_documents: int


@dataclass(frozen=True)
class SplitEntry:
    num_tokens: int
    """Token ids, the end-of-document ids included."""
    num_documents: int
    num_bytes: int
    """UTF-8 bytes of the documents' text."""
    num_samples: int
    index: str
    index_xxh3_128: str
    shards: tuple[ShardEntry, ...]
    lengths: str | None = None
    """File with the tokens of each document; None in corpora of version 1."""
    lengths_xxh3_128: str | None = None

    @property
    def has_text(self) -> bool:
        """Whether there is any token but those that end documents."""
        return self.num_tokens > self.num_documents


@dataclass(frozen=True)
class Manifest:
    """manifest.json, as far as a reader needs it."""

    vocab_size: int
    eos_id: int
    """Closes each document."""
    dtype: Literal["uint16", "uint32"]
    tokenizer: TokenizerEntry
    fingerprint: str
    """Hex; changes with any token and with the tokenizer."""
    splits: Mapping[str, SplitEntry]
    paired: bool = False
    """Documents are sources and targets in turn; no shard parts a pair."""


def parse_manifest(content: bytes, where: str) -> Manifest:
    """Raises DataError, naming `where`, for what is no manifest of a version that can be read."""
    try:
        raw = json.loads(content.decode())
    except ValueError:
        raise DataError(Problem(where, "text that is not JSON", "a corpus manifest", PREPARE_AGAIN)) from None
    if not isinstance(raw, dict) or raw.get("format") != FORMAT:
        got = repr(raw.get("format")) if isinstance(raw, dict) else "no mapping"
        raise DataError(Problem(where, f"format {got}", FORMAT, "give the folder of a corpus"))
    if raw.get("version") not in READABLE:
        remedy = "prepare the corpus again with this llmtrain, or use the llmtrain that wrote it"
        got = f"version {raw.get('version')!r}"
        allowed = f"version {' or '.join(map(str, READABLE))}"
        raise DataError(Problem(where, got, allowed, remedy))
    try:
        manifest = _decode(raw)
    except (KeyError, TypeError, ValueError, AttributeError) as error:
        got = f"an altered manifest ({type(error).__name__}: {error})"
        raise DataError(Problem(where, got, f"a manifest of version {VERSION}", PREPARE_AGAIN)) from error
    for name in _files(manifest):
        if not stays_inside(name):
            allowed = "files of the corpus' own folder"
            raise DataError(Problem(where, f"the file {name!r}", allowed, "give another corpus"))
    return manifest


def _files(manifest: Manifest) -> Iterator[str]:
    yield manifest.tokenizer.file
    for split in manifest.splits.values():
        yield split.index
        yield from (shard.file for shard in split.shards)
        if split.lengths is not None:
            yield split.lengths


def _decode(raw: Mapping[str, Any]) -> Manifest:
    if raw["dtype"] not in ("uint16", "uint32"):
        raise ValueError(f"dtype {raw['dtype']!r}")
    shard_fields = tuple(ShardEntry.__dataclass_fields__)
    optional = ("lengths", "lengths_xxh3_128")
    splits = {}
    for name, split in raw["splits"].items():
        shards = tuple(ShardEntry(*[shard[f] for f in shard_fields]) for shard in split["shards"])
        needed = [f for f in SplitEntry.__dataclass_fields__ if f not in ("shards", *optional)]
        values = {f: split[f] for f in needed} | {f: split.get(f) for f in optional}
        splits[name] = SplitEntry(**values, shards=shards)
    return Manifest(
        vocab_size=int(raw["vocab_size"]),
        eos_id=int(raw["eos_id"]),
        dtype=raw["dtype"],
        tokenizer=TokenizerEntry(
            raw["tokenizer"]["file"],
            raw["tokenizer"]["sha256"],
            {role: int(i) for role, i in raw["tokenizer"].get("special_ids", {}).items()},
            tuple(int(i) for i in raw["tokenizer"].get("sentinel_ids", ())),
        ),
        fingerprint=str(raw["fingerprint"]),
        splits=splits,
        paired=raw.get("paired") is True,
    )
