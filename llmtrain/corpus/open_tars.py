"""Tar files of a split that are open, and where documents end in them."""

from __future__ import annotations

import os
import threading
from collections import OrderedDict
from collections.abc import Mapping, Sequence

import numpy as np

from llmtrain.corpus.location import Location
from llmtrain.corpus.manifest import PREPARE_AGAIN, TarFileEntry
from llmtrain.corpus.tar_files import ENDS_DTYPE, NPY_HEADER_BYTES, TarFileError
from llmtrain.errors import Problem
from llmtrain.files import stamp_of


class OpenTar:
    """An open tar file, closed when its last reader releases it."""

    __slots__ = ("descriptor", "ends", "entry", "is_kept", "name", "stamp")

    def __init__(self, descriptor: int, name: str, entry: TarFileEntry, is_kept: bool) -> None:
        self.descriptor = descriptor
        self.name = name
        self.entry = entry
        self.ends = np.empty(0, np.int64)
        """Where its documents end in the split's stream: the position after each last token, int64,
        ascending."""
        self.is_kept = is_kept
        self.stamp = stamp_of(os.fstat(descriptor))

    def __del__(self) -> None:
        os.close(self.descriptor)

    @property
    def has_changed(self) -> bool:
        """Whether the file was changed since it was opened."""
        status = os.fstat(self.descriptor)
        # A file of a cache that has lost its name was evicted, not changed.
        return stamp_of(status) != self.stamp and (self.is_kept or status.st_nlink > 0)

    def readv(self, part: memoryview, offset: int) -> int:
        """Read into `part` from `offset`; return the number of bytes, 0 at the end of the file."""
        try:
            return os.preadv(self.descriptor, [part], offset)
        except OSError as error:
            raise self.unreadable(error) from error

    def unreadable(self, error: OSError) -> TarFileError:
        """Return the error for a failed read."""
        return TarFileError(Problem(self.name, f"{error.strerror} while reading"))

    def load_ends(self, rows: np.ndarray, start: int, dtype: np.dtype) -> None:
        """Read where documents end in its arrays.

        rows: INDEX_DTYPE, one an array. start: position of its first token in the stream. dtype: of token
        ids. Raises TarFileError for arrays that do not match the index.
        """
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
        raise TarFileError(Problem(self.name, got, "what the split's index.npy says", PREPARE_AGAIN))


class OpenTars:
    """The most recently read tar files of a split, kept open. Safe to use from several threads."""

    def __init__(
        self,
        location: Location,
        entries: Sequence[TarFileEntry],
        index: np.ndarray,
        starts: np.ndarray,
        dtype: np.dtype,
        bad: Mapping[int, Problem],
        capacity: int,
    ) -> None:
        """index: INDEX_DTYPE, of the split. starts: position of each tar file's first token in the stream.
        bad: tar files that are not to be opened. capacity: files that are open at most."""
        self._location = location
        self._entries = entries
        self._index = index
        self._rows = np.searchsorted(index["shard"], np.arange(len(entries) + 1))
        self._starts = starts
        self._dtype = dtype
        self._bad = bad
        self._capacity = capacity
        self._tars: OrderedDict[int, OpenTar] = OrderedDict()
        self._ends: np.ndarray | None = None
        self._fresh = False
        self._lock = threading.Lock()

    def open_anew(self, number: int) -> OpenTar:
        """Open the tar file of this number. Raises TarFileError for one that cannot be had, does not match
        the index, or was found bad before."""
        if number in self._bad:
            raise TarFileError(self._bad[number])
        entry = self._entries[number]
        descriptor = self._location.open_tar(entry)
        opened = OpenTar(descriptor, self._location.name(entry.file), entry, self._location.is_kept)
        rows = self._index[self._rows[number] : self._rows[number + 1]]
        opened.load_ends(rows, int(self._starts[number]), self._dtype)
        return opened

    def get(self, numbers: Sequence[int]) -> dict[int, OpenTar]:
        """Return these tar files, open. Raises TarFileError for one that cannot be had or no longer matches
        the index."""
        found: dict[int, OpenTar] = {}
        with self._lock:
            for number in numbers:
                opened = self._tars.get(number)
                if opened is not None:
                    self._tars.move_to_end(number)
                    found[number] = opened
        for number in numbers:
            if number in found and not found[number].has_changed:
                continue
            opened = found[number] = self.open_anew(number)
            with self._lock:
                self._tars[number] = opened
                self._ends = None
                self._fresh = True
                if len(self._tars) > self._capacity:
                    self._tars.popitem(last=False)
        return found

    def all_ends(self, numbers: Sequence[int]) -> np.ndarray | None:
        """Return where the documents of all open tar files end, ascending, if `numbers` are among them.

        None if a tar file was opened since the last call: while files come and go, the array would be made
        again at each call.
        """
        with self._lock:
            if self._fresh:
                self._fresh = False
                return None
            if not numbers or not all(number in self._tars for number in numbers):
                return None
            if self._ends is None:
                held = sorted(self._tars)
                self._ends = np.concatenate([self._tars[number].ends for number in held])
            return self._ends
