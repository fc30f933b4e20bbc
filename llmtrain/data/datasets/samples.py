"""What datasets share that are made of one split of a token corpus.

Dim names: S shards.
"""

from __future__ import annotations

import threading
from collections import OrderedDict
from collections.abc import Sequence
from typing import Generic, TypeVar

import numpy as np
import xxhash

from llmtrain.corpus.token_split import MOST_OPEN_TARS, TokenSplit

P = TypeVar("P")


class SamplesOfSplit:
    """Numbered samples, those of a shard behind those of the one before."""

    def __init__(self, split: TokenSplit, key: str) -> None:
        """key: what tells these samples from others that are made of the same split."""
        self._split = split
        self._key = f"{split.fingerprint}/{split.name}/{key}"

    def _set_sizes(self, sizes: np.ndarray) -> None:
        """Samples in each shard, int64 (S,)."""
        self.shard_sizes = sizes
        self._firsts = np.concatenate([np.zeros(1, np.int64), np.cumsum(sizes)])

    @property
    def fingerprint(self) -> str:
        return xxhash.xxh3_128_hexdigest(self._key.encode())

    def __len__(self) -> int:
        return int(self._firsts[-1])

    @property
    def tar_names(self) -> list[str]:
        return self._split.tar_names

    def want(self, shards: Sequence[int]) -> None:
        self._split.want(shards)

    def find_bad(self, shards: Sequence[int]) -> list[int]:
        return self._split.find_bad(shards)

    def _shards_of(self, indices: np.ndarray) -> np.ndarray:
        """The shard of each sample."""
        return np.searchsorted(self._firsts, indices, side="right") - 1


class Recent(Generic[P]):
    """What was made of the shards that were in use last; several threads may ask."""

    def __init__(self) -> None:
        self._made: OrderedDict[int, P] = OrderedDict()
        self._lock = threading.Lock()

    def get(self, shard: int) -> P | None:
        with self._lock:
            if shard in self._made:
                self._made.move_to_end(shard)
            return self._made.get(shard)

    def keep(self, shard: int, made: P) -> P:
        with self._lock:
            self._made[shard] = made
            if len(self._made) > MOST_OPEN_TARS:
                self._made.popitem(last=False)
        return made
