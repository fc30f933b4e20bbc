"""The token stream of a split, read from its tar files.

A split is one long stream of token ids, documents in order, each closed by the end-of-document id. The stream
lies in tar files as arrays of whole documents ("samples"); `index.npy` gives the byte offset of each array,
so that any span of the stream is a few positioned reads. Positioned reads rather than memory maps: they
release the interpreter lock while the disk works, and a file that shrinks during a run is an error with a
name instead of a bus error.
"""

from __future__ import annotations

import hashlib
import os
from collections.abc import Iterable, Mapping, Sequence
from functools import cached_property
from types import MappingProxyType

import numpy as np

from llmtrain.corpus.location import Location
from llmtrain.corpus.manifest import PREPARE_AGAIN, Manifest
from llmtrain.corpus.open_tars import OpenTar, OpenTars
from llmtrain.corpus.split_arrays import check_index, read_index, read_lengths
from llmtrain.corpus.tar_files import TarFileError
from llmtrain.errors import Problem

MOST_OPEN_TARS = 64
"""Tar files kept open at most: a corpus may have more than a process may have open files."""


class TokenSplit:
    """The token stream of one split. Safe to read from several threads.

    Positions in the stream count over the whole split; tar file n holds those from tar_starts[n] up to
    tar_starts[n + 1].
    """

    def __init__(
        self,
        location: Location,
        name: str,
        manifest: Manifest,
        *,
        bad_tars: Mapping[int, Problem] = MappingProxyType({}),
        most_open: int = MOST_OPEN_TARS,
    ) -> None:
        self.name = name
        self._location = location
        self._entry = entry = manifest.splits[name]
        self._fingerprint = manifest.fingerprint
        self._dtype = np.dtype(manifest.dtype).newbyteorder("<")
        self._vocab_size = manifest.vocab_size
        index = read_index(location, entry, self._dtype)
        self._tar_numbers = index["shard"].astype(np.int64)
        self._tokens_offsets = index["tokens_offset"].astype(np.int64)
        self._sample_starts = np.zeros(len(index) + 1, dtype=np.int64)
        np.cumsum(index["num_tokens"], out=self._sample_starts[1:])
        tokens = np.array([tar.num_tokens for tar in entry.shards], dtype=np.int64)
        self.tar_starts = np.concatenate([np.zeros(1, np.int64), np.cumsum(tokens)])
        firsts = np.searchsorted(self._tar_numbers, np.arange(len(tokens) + 1))
        check_index(location, entry, self._sample_starts[firsts], self.tar_starts)
        self._open = OpenTars(
            location, entry.shards, index, self.tar_starts, self._dtype, bad_tars, most_open
        )

    @property
    def dtype(self) -> np.dtype:
        """The type of token ids: uint16 or uint32."""
        return self._dtype

    @property
    def num_tokens(self) -> int:
        return self._entry.num_tokens

    @property
    def num_documents(self) -> int:
        return self._entry.num_documents

    @property
    def num_bytes(self) -> int:
        """UTF-8 bytes of the documents' text."""
        return self._entry.num_bytes

    @property
    def fingerprint(self) -> str:
        """The fingerprint of the whole corpus, in hex."""
        return self._fingerprint

    @cached_property
    def identity(self) -> str:
        """A hash, in hex, of the manifest's entry: splits with the same identity have the same content."""
        return hashlib.sha256(repr(self._entry).encode()).hexdigest()

    @property
    def tar_names(self) -> list[str]:
        """The names of the tar files in messages."""
        return [self._location.name(tar.file) for tar in self._entry.shards]

    def read(self, start: int, stop: int) -> tuple[np.ndarray, np.ndarray]:
        """Return the tokens [start, stop) of the stream, and where documents end among them.

        Returns (tokens, uint16 or uint32 [stop − start]; ends, int64, ascending, relative to start: the last
        token of a document is at end − 1, 0 < end ≤ stop − start).
        Raises IndexError for a window outside the stream, TarFileError for a tar file that cannot be read.
        """
        if not 0 <= start <= stop <= self.num_tokens:
            raise IndexError(f"window [{start}, {stop}) outside the {self.num_tokens} tokens of {self.name}")
        first = int(np.searchsorted(self.tar_starts, start, side="right")) - 1
        last = int(np.searchsorted(self.tar_starts, stop, side="left"))
        borders = np.clip(self.tar_starts[first : last + 1], start, stop)
        tokens = np.empty(stop - start, dtype=self._dtype)
        self.read_spans(borders[:-1], np.diff(borders), tokens, borders[:-1] - start)
        spans, ends = self.document_ends(borders[:-1], np.diff(borders))
        return tokens, ends + (borders[:-1] - start)[spans]

    def read_spans(
        self, starts: np.ndarray, lengths: np.ndarray, out: np.ndarray, positions: np.ndarray
    ) -> None:
        """Read tokens [starts[i], starts[i] + lengths[i]) of the stream into out[positions[i]:].

        out: 1-D, contiguous, of `dtype`. Each span lies within one tar file.
        Raises TarFileError for a tar file that cannot be read, or that holds ids outside the vocabulary.
        """
        samples = np.searchsorted(self._sample_starts, starts, side="right") - 1
        itemsize = self._dtype.itemsize
        tars = self._tar_numbers[samples]
        opened = self._open.get(np.unique(tars).tolist())
        offsets = self._tokens_offsets[samples] + (starts - self._sample_starts[samples]) * itemsize
        fits = starts + lengths <= self._sample_starts[samples + 1]
        view = out.view(np.uint8).data
        sizes = lengths * itemsize
        # The loop takes a microsecond a span: only the read is in it.
        missing = []
        span, preadv = 0, os.preadv
        try:
            for span, (descriptor, offset, begin, size) in enumerate(
                zip(
                    [opened[tar].descriptor for tar in tars.tolist()],
                    offsets.tolist(),
                    (positions * itemsize).tolist(),
                    np.where(fits, sizes, 0).tolist(),
                    strict=True,
                )
            ):
                if preadv(descriptor, (view[begin : begin + size],), offset) != size:
                    missing.append(span)
        except OSError as error:
            raise opened[int(tars[span])].unreadable(error) from error
        for span in [*missing, *np.flatnonzero(~fits).tolist()]:
            begin = int(positions[span]) * itemsize
            part = view[begin : begin + int(sizes[span])]
            self._read_over_samples(opened[int(tars[span])], int(starts[span]), int(lengths[span]), part)
        if out.size and int(out.max()) >= self._vocab_size:
            self._refuse_ids(starts, lengths, out, positions, tars)

    def document_ends(self, starts: np.ndarray, lengths: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Return where documents end in spans of the stream: (span, end) pairs, int64, ascending, with
        0 < end ≤ length; the last token of a document is at end − 1. Each span lies within one tar file."""
        tars = np.searchsorted(self.tar_starts, starts, side="right") - 1
        asked = np.unique(tars).tolist()
        opened = self._open.get(asked)
        together = self._open.all_ends(asked)
        if together is not None:
            return _ends_in_spans(together, starts, lengths)
        found = [
            (chosen, _ends_in_spans(opened[tar].ends, starts[chosen], lengths[chosen]))
            for tar in asked
            for chosen in [np.flatnonzero(tars == tar)]
        ]
        spans = np.concatenate([np.empty(0, np.int64), *(chosen[inner] for chosen, (inner, _) in found)])
        ends = np.concatenate([np.empty(0, np.int64), *(ends for _, (_, ends) in found)])
        order = np.argsort(spans, kind="stable")
        return spans[order], ends[order]

    def document_lengths(self) -> list[np.ndarray]:
        """Return the number of tokens of each document, its end-of-document id included, for each tar file.

        Raises DataError for a corpus of version 1, which has no lengths.
        """
        return read_lengths(self._location, self._entry)

    def lengths_of(self, tar: int) -> np.ndarray:
        """Return the number of tokens of each document of one tar file, its end-of-document id included,
        int64. They are read from the tar file itself."""
        ends = self._open.get([tar])[tar].ends
        return np.diff(ends, prepend=self.tar_starts[tar])

    def want(self, tars: Sequence[int]) -> None:
        """Announce that these tar files will be read soon, in this order."""
        self._location.want([self._entry.shards[tar] for tar in tars])

    def find_bad(self, tars: Iterable[int]) -> list[int]:
        """Return those of these tar files that cannot be read now; each is opened anew."""
        bad = []
        for tar in tars:
            try:
                self._open.open_anew(tar)
            except TarFileError:
                bad.append(tar)
        return bad

    def _read_over_samples(self, opened: OpenTar, start: int, length: int, part: memoryview) -> None:
        """Read a span of several samples of a tar file, between which headers lie."""
        sample = int(np.searchsorted(self._sample_starts, start, side="right")) - 1
        itemsize = self._dtype.itemsize
        while length > 0:
            sample_start, sample_stop = self._sample_starts[sample : sample + 2].tolist()
            taken = min(length, sample_stop - start)
            offset = int(self._tokens_offsets[sample]) + (start - sample_start) * itemsize
            self._read_again(opened, part[: taken * itemsize], offset)
            part, start, length, sample = part[taken * itemsize :], start + taken, length - taken, sample + 1

    def _read_again(self, opened: OpenTar, part: memoryview, offset: int) -> None:
        """Read until `part` is full. Raises TarFileError for a file that ends before."""
        while part:
            count = opened.readv(part, offset)
            if count == 0:
                got = f"a tar file that ends before byte {offset + len(part)}"
                raise TarFileError(Problem(opened.name, got, f"{opened.entry.bytes} bytes", PREPARE_AGAIN))
            part, offset = part[count:], offset + count

    def _refuse_ids(
        self,
        starts: np.ndarray,
        lengths: np.ndarray,
        out: np.ndarray,
        positions: np.ndarray,
        tars: np.ndarray,
    ) -> None:
        """Raise TarFileError with the first id that is outside the vocabulary."""
        for start, length, position, tar in zip(starts, lengths, positions, tars, strict=True):
            span = out[position : position + length]
            for at in np.flatnonzero(span >= self._vocab_size)[:1]:
                name = self.tar_names[tar]
                token = int(start + at - self.tar_starts[tar])
                allowed = f"0 to {self._vocab_size - 1}, the vocabulary of its corpus"
                got = f"the token id {span[at]} at token {token:,}"
                raise TarFileError(Problem(name, got, allowed, PREPARE_AGAIN))


def _ends_in_spans(
    ends: np.ndarray, starts: np.ndarray, lengths: np.ndarray
) -> tuple[np.ndarray, np.ndarray]:
    """Return (span, end within it) for each of the ascending `ends` in (starts[i], starts[i] +
    lengths[i]]."""
    first = np.searchsorted(ends, starts, side="right")
    counts = np.searchsorted(ends, starts + lengths, side="right") - first
    spans = np.repeat(np.arange(len(starts)), counts)
    chosen = np.arange(len(spans)) + np.repeat(first - (np.cumsum(counts) - counts), counts)
    return spans, ends[chosen] - starts[spans]
