"""Shards of a corpus that are open, and where documents close in them."""

from __future__ import annotations

import os
import threading
from collections import OrderedDict
from collections.abc import Mapping, Sequence

import numpy as np

from llmtrain.corpus.manifest import PREPARE_AGAIN, ShardEntry
from llmtrain.corpus.storage import Place
from llmtrain.corpus.tar_files import ENDS_DTYPE, NPY_HEADER_BYTES, ShardError
from llmtrain.errors import Problem
from llmtrain.files import stamp_of


class OpenShard:
    """An open shard that closes when its last reader lets go of it."""

    __slots__ = ("descriptor", "ends", "entry", "is_kept", "name", "stamp")

    def __init__(self, descriptor: int, name: str, entry: ShardEntry, is_kept: bool) -> None:
        self.descriptor = descriptor
        self.name = name
        self.entry = entry
        self.ends = np.empty(0, np.int64)
        """Where its documents close in the split's stream, ascending."""
        self.is_kept = is_kept
        self.stamp = stamp_of(os.fstat(descriptor))

    def __del__(self) -> None:
        os.close(self.descriptor)

    @property
    def has_changed(self) -> bool:
        status = os.fstat(self.descriptor)
        # Without a name it has been evicted, which is no change of its content.
        return stamp_of(status) != self.stamp and (self.is_kept or status.st_nlink > 0)

    def readv(self, part: memoryview, offset: int) -> int:
        """Bytes read at `offset`; 0 at the end of the file."""
        try:
            return os.preadv(self.descriptor, [part], offset)
        except OSError as error:
            raise self.unreadable(error) from error

    def unreadable(self, error: OSError) -> ShardError:
        return ShardError(Problem(self.name, f"{error.strerror} while reading"))

    def load_ends(self, rows: np.ndarray, start: int, dtype: np.dtype) -> None:
        """Read where documents close in its arrays, whose INDEX_DTYPE rows these are; `start` is its first
        token's place in the stream. Raises ShardError where the arrays are not what the index says."""
        found = []
        for row in rows:
            tokens, documents = int(row["num_tokens"]), int(row["num_documents"])
            self._check_array(int(row["tokens_offset"]), tokens, dtype)
            self._check_array(int(row["ends_offset"]), documents, ENDS_DTYPE)
            ends = np.empty(documents, ENDS_DTYPE)
            self.readv(ends.view(np.uint8).data, int(row["ends_offset"]))
            begins = np.concatenate([np.zeros(1, np.int64), ends])
            if int(begins[-1]) != tokens or not (np.diff(begins) > 0).all():
                self._disagree(f"documents that do not end one after the other, the last at token {tokens}")
            found.append(begins[1:] + start)
            start += tokens
        self.ends = np.concatenate(found) if found else np.empty(0, np.int64)

    def _check_array(self, offset: int, length: int, dtype: np.dtype) -> None:
        header = bytearray(NPY_HEADER_BYTES)
        self.readv(memoryview(header), offset - NPY_HEADER_BYTES)
        expected = f"{{'descr': '{dtype.str}', 'fortran_order': False, 'shape': ({length},), }}".encode()
        if not header.startswith(b"\x93NUMPY") or expected not in header:
            self._disagree(f"no array of {length} {dtype} at byte {offset}")

    def _disagree(self, got: str) -> None:
        raise ShardError(Problem(self.name, got, "what the split's index.npy says", PREPARE_AGAIN))


class OpenShards:
    """The shards read last, kept open."""

    def __init__(
        self,
        place: Place,
        entries: Sequence[ShardEntry],
        index: np.ndarray,
        shard_starts: np.ndarray,
        dtype: np.dtype,
        bad: Mapping[int, Problem],
        capacity: int,
    ) -> None:
        self._place = place
        self._entries = entries
        self._index = index
        self._rows = np.searchsorted(index["shard"], np.arange(len(entries) + 1))
        self._starts = shard_starts
        self._dtype = dtype
        self._bad = bad
        self._capacity = capacity
        self._shards: OrderedDict[int, OpenShard] = OrderedDict()
        self._ends: np.ndarray | None = None
        self._fresh = False
        self._lock = threading.Lock()

    def open_anew(self, shard: int) -> OpenShard:
        """Raises ShardError for one that cannot be had, is not what the index says, or was found bad."""
        if shard in self._bad:
            raise ShardError(self._bad[shard])
        entry = self._entries[shard]
        descriptor = self._place.open_shard(entry)
        opened = OpenShard(descriptor, self._place.name(entry.file), entry, self._place.is_kept)
        rows = self._index[self._rows[shard] : self._rows[shard + 1]]
        opened.load_ends(rows, int(self._starts[shard]), self._dtype)
        return opened

    def get(self, shards: Sequence[int]) -> dict[int, OpenShard]:
        """These, open. Raises ShardError for one that cannot be had or was changed since it was opened."""
        found: dict[int, OpenShard] = {}
        with self._lock:
            for shard in shards:
                opened = self._shards.get(shard)
                if opened is not None:
                    self._shards.move_to_end(shard)
                    found[shard] = opened
        for shard in shards:
            if shard in found and not found[shard].has_changed:
                continue
            opened = found[shard] = self.open_anew(shard)
            with self._lock:
                self._shards[shard] = opened
                self._ends = None
                self._fresh = True
                if len(self._shards) > self._capacity:
                    self._shards.popitem(last=False)
        return found

    def all_ends(self, shards: Sequence[int]) -> np.ndarray | None:
        """Where the documents of all open shards close, ascending, when they have been open since the last
        call and `shards` are among them; None while shards come and go, when it would be made in vain."""
        with self._lock:
            if self._fresh:
                self._fresh = False
                return None
            if not shards or not all(shard in self._shards for shard in shards):
                return None
            if self._ends is None:
                held = sorted(self._shards)
                self._ends = np.concatenate([self._shards[shard].ends for shard in held])
            return self._ends
