"""The corpora of a run: one, or those of a mixture, all with the same tokenizer."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from pathlib import Path
from typing import TYPE_CHECKING

import xxhash

from llmtrain.corpus.cache import Cache, Counters
from llmtrain.corpus.config import TokenDataConfig
from llmtrain.corpus.corpus import Corpus
from llmtrain.corpus.location import RemoteLocation
from llmtrain.corpus.manifest import PREPARE_AGAIN
from llmtrain.corpus.token_split import TokenSplit
from llmtrain.corpus.transport import is_remote
from llmtrain.errors import DataError, Problem
from llmtrain.files import expand_home

if TYPE_CHECKING:
    from llmtrain.tokenizers.base import Tokenizer


class Corpora:
    """Name → corpus; `open_corpora` makes them."""

    def __init__(self, corpora: Mapping[str, Corpus]) -> None:
        self.by_name = dict(corpora)
        self._first = next(iter(corpora.values()))

    @property
    def where(self) -> str:
        """The names of the corpora in messages."""
        return ", ".join(corpus.where for corpus in self.by_name.values())

    @property
    def tokenizer_path(self) -> Path:
        """The argument of `load_tokenizer`."""
        return self._first.tokenizer_path

    def load_tokenizer(self) -> Tokenizer:
        """Return the tokenizer. Raises DataError for one with fewer ids than its corpus."""
        from llmtrain.tokenizers.folder import load_tokenizer

        tokenizer = load_tokenizer(self.tokenizer_path)
        if tokenizer.vocab_size < self.vocab_size:
            got = f"a tokenizer of {tokenizer.vocab_size:,} ids"
            allowed = f"{self.vocab_size:,}, as {self.where} says"
            raise DataError(Problem(str(self.tokenizer_path), got, allowed, PREPARE_AGAIN))
        return tokenizer

    @property
    def tokenizer_sha256(self) -> str:
        return self._first.manifest.tokenizer.sha256

    @property
    def special_ids(self) -> Mapping[str, int]:
        """Role → id, as in the tokenizer."""
        return self._first.manifest.tokenizer.special_ids

    @property
    def sentinel_ids(self) -> tuple[int, ...]:
        """The ids of <extra_id_0>, <extra_id_1>, …"""
        return self._first.manifest.tokenizer.sentinel_ids

    @property
    def eos_id(self) -> int:
        """The id that ends each document."""
        return self._first.manifest.eos_id

    @property
    def paired(self) -> bool:
        """Whether documents alternate between sources and targets."""
        return self._first.manifest.paired

    @property
    def vocab_size(self) -> int:
        return self._first.manifest.vocab_size

    @property
    def fingerprint(self) -> str:
        """Hex; changes with any token and with the tokenizer."""
        if len(self.by_name) == 1:
            return self._first.manifest.fingerprint
        named = sorted(f"{name}={corpus.manifest.fingerprint}" for name, corpus in self.by_name.items())
        return xxhash.xxh3_128_hexdigest("/".join(named).encode())

    def counters(self) -> dict[str, float]:
        """Return the counters of the caches of remote corpora as metrics of this process; {} if all are
        local."""
        locations = [corpus.location for corpus in self.by_name.values()]
        caches = [location.cache for location in locations if isinstance(location, RemoteLocation)]
        return {
            f"cache_{name}": float(sum(getattr(cache.counters, name) for cache in caches))
            for name in (Counters.__dataclass_fields__ if caches else ())
        }

    def close(self) -> None:
        """End the read-ahead of remote corpora."""
        for corpus in self.by_name.values():
            if isinstance(corpus.location, RemoteLocation):
                corpus.location.cache.close()

    def splits(self, name: str, optional: Collection[str] = ()) -> dict[str, TokenSplit]:
        """Return the split of each corpus by the corpus' name.

        optional: corpora that are left out if they have no such split, or an empty one.
        Raises DataError for any other corpus without text in this split, and if no corpus has any.
        """
        left_out = {*self.without(name)} & {*optional}
        chosen = [key for key in self.by_name if key not in left_out] or list(self.by_name)
        return {key: self.by_name[key].split(name) for key in chosen}

    def without(self, split: str) -> list[str]:
        """Return the corpora that have no text in the split; none if no corpus has a split of this name."""
        splits = {key: corpus.manifest.splits.get(split) for key, corpus in self.by_name.items()}
        if not any(splits.values()):
            return []
        return [key for key, entry in splits.items() if entry is None or not entry.has_text]


def open_corpora(data: TokenDataConfig) -> Corpora:
    """Open the corpora. Raises DataError with the problems of each, and for different tokenizers."""
    problems: list[Problem] = []
    opened: dict[str, Corpus] = {}
    for name, path in data.paths.items():
        remote = is_remote(path)
        try:
            opened[name] = Corpus.open(
                path if remote else expand_home(path),
                data.verify,
                on_bad_tar=data.on_bad_tar,
                cache=Cache(data.cache) if remote else None,
            )
        except DataError as error:
            problems += error.problems
    if not problems:
        first, *others = opened.items()
        ours = first[1].manifest.tokenizer.sha256
        for name, corpus in others:
            theirs = corpus.manifest.tokenizer.sha256
            if theirs != ours:
                remedy = f"prepare it with tokenizer.model={first[1].tokenizer_path}"
                got = f"{corpus.where}, prepared with another tokenizer ({theirs[:12]}…)"
                problems.append(
                    Problem(f"data.mixture.{name}", got, f"that of {first[0]} ({ours[:12]}…)", remedy)
                )
            if corpus.manifest.paired != first[1].manifest.paired:
                kinds = {True: "a corpus of pairs", False: "a corpus of single texts"}
                allowed = f"what {first[0]} is, {kinds[first[1].manifest.paired]}"
                got = f"{corpus.where}, {kinds[corpus.manifest.paired]}"
                problems.append(Problem(f"data.mixture.{name}", got, allowed))
    if problems:
        raise DataError(problems)
    return Corpora(opened)
