"""Base of datasets that are made from one split of a token corpus.

Dim names: S tar files.
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
    """Numbered samples, tar file after tar file."""

    def __init__(self, split: TokenSplit, key: str) -> None:
        """key: distinguishes these samples from others of the same split."""
        self._split = split
        self._key = f"{split.fingerprint}/{split.name}/{key}"

    def _set_sizes(self, sizes: np.ndarray) -> None:
        """Set the number of samples of each tar file, int64 (S,)."""
        self.tar_sizes = sizes
        self._firsts = np.concatenate([np.zeros(1, np.int64), np.cumsum(sizes)])

    @property
    def fingerprint(self) -> str:
        return xxhash.xxh3_128_hexdigest(self._key.encode())

    def __len__(self) -> int:
        return int(self._firsts[-1])

    @property
    def tar_names(self) -> list[str]:
        return self._split.tar_names

    def want(self, tars: Sequence[int]) -> None:
        self._split.want(tars)

    def find_bad(self, tars: Sequence[int]) -> list[int]:
        return self._split.find_bad(tars)

    def _tars_of(self, indices: np.ndarray) -> np.ndarray:
        """Return the tar file of each sample."""
        return np.searchsorted(self._firsts, indices, side="right") - 1


class Recent(Generic[P]):
    """A cache of results for the most recently used tar files; callable from any thread."""

    def __init__(self) -> None:
        self._made: OrderedDict[int, P] = OrderedDict()
        self._lock = threading.Lock()

    def get(self, tar: int) -> P | None:
        with self._lock:
            if tar in self._made:
                self._made.move_to_end(tar)
            return self._made.get(tar)

    def keep(self, tar: int, made: P) -> P:
        with self._lock:
            self._made[tar] = made
            if len(self._made) > MOST_OPEN_TARS:
                self._made.popitem(last=False)
        return made
