"""The corpora that one run reads: one, or those of a mixture, all of one tokenizer."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from pathlib import Path
from typing import TYPE_CHECKING

import xxhash

from llmtrain.corpus.cache import Cache, Counters
from llmtrain.corpus.config import TokenDataConfig
from llmtrain.corpus.corpus import Corpus, TokenSplit
from llmtrain.corpus.manifest import PREPARE_AGAIN
from llmtrain.corpus.storage import Elsewhere
from llmtrain.corpus.transport import is_remote
from llmtrain.errors import DataError, Problem
from llmtrain.files import at_home

if TYPE_CHECKING:
    from llmtrain.tokenizers.base import Tokenizer


class Corpora:
    """Name → corpus; `open_corpora` makes them."""

    def __init__(self, corpora: Mapping[str, Corpus]) -> None:
        self.by_name = dict(corpora)
        self._first = next(iter(corpora.values()))

    @property
    def where(self) -> str:
        """As messages call them."""
        return ", ".join(corpus.where for corpus in self.by_name.values())

    @property
    def tokenizer_path(self) -> Path:
        """What `load_tokenizer` takes."""
        return self._first.tokenizer_path

    def load_tokenizer(self) -> Tokenizer:
        """Raises DataError for one that lacks ids which its corpus says that it has."""
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
        """Role → id, as the tokenizer has them."""
        return self._first.manifest.tokenizer.special_ids

    @property
    def sentinel_ids(self) -> tuple[int, ...]:
        """Of the tokenizer's <extra_id_0>, <extra_id_1>, …"""
        return self._first.manifest.tokenizer.sentinel_ids

    @property
    def eos_id(self) -> int:
        """Closes each document."""
        return self._first.manifest.eos_id

    @property
    def paired(self) -> bool:
        """Whether their documents are sources and targets in turn."""
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
        """What was done to have remote corpora here, as metrics of this process; {} if all are local."""
        places = [corpus.place for corpus in self.by_name.values()]
        caches = [place.cache for place in places if isinstance(place, Elsewhere)]
        return {
            f"cache_{name}": float(sum(getattr(cache.counters, name) for cache in caches))
            for name in (Counters.__dataclass_fields__ if caches else ())
        }

    def close(self) -> None:
        """End what is still read ahead of remote corpora."""
        for corpus in self.by_name.values():
            if isinstance(corpus.place, Elsewhere):
                corpus.place.cache.close()

    def splits(self, name: str, optional: Collection[str] = ()) -> dict[str, TokenSplit]:
        """Corpus → its split. Raises DataError for one that has no such split, or an empty one; `optional`
        ones are left out then, and only if all are so it raises."""
        left_out = {*self.without(name)} & {*optional}
        chosen = [key for key in self.by_name if key not in left_out] or list(self.by_name)
        return {key: self.by_name[key].split(name) for key in chosen}

    def without(self, split: str) -> list[str]:
        """Corpora whose split is empty; a split that none has is no split's name."""
        splits = {key: corpus.manifest.splits.get(split) for key, corpus in self.by_name.items()}
        if not any(splits.values()):
            return []
        return [key for key, entry in splits.items() if entry is None or not entry.has_text]


def open_corpora(data: TokenDataConfig) -> Corpora:
    """Raises DataError with what is wrong with each, and for corpora of different tokenizers."""
    problems: list[Problem] = []
    opened: dict[str, Corpus] = {}
    for name, path in data.paths.items():
        remote = is_remote(path)
        try:
            opened[name] = Corpus.open(
                path if remote else at_home(path),
                data.verify,
                on_bad_shard=data.on_bad_shard,
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
