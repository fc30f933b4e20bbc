"""Reads a corpus that `llmtrain prepare` wrote: a manifest, a tokenizer, and token shards per split.

A split is one long stream of token ids, documents in order, each closed by the end-of-document id.
The stream lies in tar shards as arrays of whole documents ("samples"); `index.npy` gives each array's
byte offset, so that any span of the stream is a few positioned reads. Positioned reads rather than
memory maps: they release the interpreter while the disk works, and a file that shrinks during a run
is an error with a name instead of a bus error.
"""

from __future__ import annotations

import hashlib
import os
from collections.abc import Iterable, Mapping, Sequence
from functools import cached_property
from pathlib import Path
from types import MappingProxyType
from typing import Literal

import numpy as np
import psutil

from llmtrain.corpus.cache import Cache
from llmtrain.corpus.manifest import (
    FORMAT,
    MANIFEST_BYTES,
    MANIFEST_NAME,
    PREPARE_AGAIN,
    STAMP_NAME,
    UNFINISHED_NAME,
    VERSION,
    Manifest,
    SplitEntry,
    parse_manifest,
)
from llmtrain.corpus.npy import parse_array
from llmtrain.corpus.open_tars import OpenShard, OpenShards
from llmtrain.corpus.storage import Elsewhere, Folder, Place, Problems, not_a_corpus
from llmtrain.corpus.tar_files import (
    ENDS_DTYPE,
    INDEX_DTYPE,
    LENGTHS_DTYPE,
    NPY_HEADER_BYTES,
    ShardError,
)
from llmtrain.errors import DataError, Problem, nearest
from llmtrain.tokenizers.checks import TOKENIZER_BYTES

__all__ = ["FORMAT", "MANIFEST_NAME", "STAMP_NAME", "UNFINISHED_NAME", "VERSION", "Corpus", "TokenSplit"]

_MOST_PROBLEMS = 5
_LONGEST_HEADER = 4096
"""Bytes before the data of an array; none here has as many."""
OPEN_SHARDS = 64
"""Kept open at most; a corpus has more shards than a process has files."""


class Corpus:
    """A prepared corpus; `Corpus.open` makes one."""

    def __init__(self, place: Place, manifest: Manifest, tokenizer_path: Path) -> None:
        self.place = place
        self.manifest = manifest
        self.tokenizer_path = tokenizer_path
        """What `load_tokenizer` takes."""
        self.bad_shards: Problems = {}
        """Files of shards found bad when it was opened with on_bad_shard="skip"."""

    @classmethod
    def open(
        cls,
        path: str | Path,
        verify: Literal["size", "checksum"] = "size",
        *,
        on_bad_shard: Literal["error", "skip"] = "error",
        cache: Cache | None = None,
    ) -> Corpus:
        """Open the corpus in a folder or, given a cache, behind a URL, and check that it is whole.

        Always: the manifest, the tokenizer's hash, and in a folder the size of every shard. `checksum` also
        reads the shards that have changed since they were last read whole. What comes from elsewhere is
        compared with its checksum when it arrives.
        Raises DataError with the files that are missing, truncated or altered.
        """
        place: Place
        if cache is not None:
            place = Elsewhere(str(path), cache)
        else:
            place = Folder(Path(path))
            if not os.path.isfile(Path(path) / MANIFEST_NAME):
                raise DataError(not_a_corpus(Path(path)))
        manifest = parse_manifest(place.read(MANIFEST_NAME, MANIFEST_BYTES), place.name(MANIFEST_NAME))
        corpus = cls(place, manifest, _tokenizer(place, manifest))
        shards = [shard for split in manifest.splits.values() for shard in split.shards]
        found = place.find_problems(shards, checksums=verify == "checksum")
        if on_bad_shard == "error":
            _refuse(list(found.values()))
        corpus.bad_shards = found
        return corpus

    @property
    def where(self) -> str:
        """As messages call it."""
        return self.place.name("").rstrip("/")

    def split(self, name: str) -> TokenSplit:
        """Raises DataError for a split that does not exist or holds no token, and for an altered index."""
        entry = self.manifest.splits.get(name)
        if entry is None:
            known = list(self.manifest.splits)
            raise DataError(Problem(self.where, f"no split {name!r}", nearest(name, known)))
        if entry.num_tokens == 0:
            remedy = "prepare more text, or a larger share for this split"
            raise DataError(Problem(self.where, f"an empty split {name!r}", "one token or more", remedy))
        if not entry.has_text:
            got = f"a split {name!r} of {entry.num_documents:,} documents without any token"
            remedy = "prepare it again, of text that its tokenizer knows or with another tokenizer.model"
            raise DataError(Problem(self.where, got, "one token or more", remedy))
        found = self.bad_shards
        bad = {i: found[shard.file] for i, shard in enumerate(entry.shards) if shard.file in found}
        return TokenSplit(self.place, name, self.manifest, bad_shards=bad)


class TokenSplit:
    """One split's token stream. Safe to read from several threads.

    Places in the stream count over the whole split; shard s holds those from shard_starts[s] up to
    shard_starts[s + 1].
    """

    def __init__(
        self,
        place: Place,
        name: str,
        manifest: Manifest,
        *,
        bad_shards: Mapping[int, Problem] = MappingProxyType({}),
        open_shards: int = OPEN_SHARDS,
    ) -> None:
        self.name = name
        self._place = place
        self._entry = entry = manifest.splits[name]
        self._fingerprint = manifest.fingerprint
        self._dtype = np.dtype(manifest.dtype).newbyteorder("<")
        self._vocab_size = manifest.vocab_size
        index = _read_index(place, entry, self._dtype)
        self._shard_numbers = index["shard"].astype(np.int64)
        self._tokens_offsets = index["tokens_offset"].astype(np.int64)
        self._sample_starts = np.zeros(len(index) + 1, dtype=np.int64)
        np.cumsum(index["num_tokens"], out=self._sample_starts[1:])
        tokens = np.array([shard.num_tokens for shard in entry.shards], dtype=np.int64)
        self.shard_starts = np.concatenate([np.zeros(1, np.int64), np.cumsum(tokens)])
        firsts = np.searchsorted(self._shard_numbers, np.arange(len(tokens) + 1))
        _check_index(place, entry, self._sample_starts[firsts], self.shard_starts)
        self._open = OpenShards(
            place, entry.shards, index, self.shard_starts, self._dtype, bad_shards, open_shards
        )

    @property
    def dtype(self) -> np.dtype:
        """Of token ids: uint16 or uint32."""
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
        """The whole corpus' fingerprint, hex."""
        return self._fingerprint

    @cached_property
    def identity(self) -> str:
        """Hex over all that the manifest says of this split: what two that share it have in common is all
        that can be read of them."""
        return hashlib.sha256(repr(self._entry).encode()).hexdigest()

    @property
    def shard_names(self) -> list[str]:
        """As messages call them."""
        return [self._place.name(shard.file) for shard in self._entry.shards]

    def read(self, start: int, stop: int) -> tuple[np.ndarray, np.ndarray]:
        """Tokens [start, stop) of the stream, and the document ends inside.

        Returns (tokens, uint16 or uint32 [stop − start]; ends, int64, ascending, relative to start: a
        document closes just before each, 0 < end ≤ stop − start).
        Raises IndexError for a window outside the stream, ShardError for a shard that cannot be read.
        """
        if not 0 <= start <= stop <= self.num_tokens:
            raise IndexError(f"window [{start}, {stop}) outside the {self.num_tokens} tokens of {self.name}")
        first = int(np.searchsorted(self.shard_starts, start, side="right")) - 1
        last = int(np.searchsorted(self.shard_starts, stop, side="left"))
        borders = np.clip(self.shard_starts[first : last + 1], start, stop)
        tokens = np.empty(stop - start, dtype=self._dtype)
        self.read_spans(borders[:-1], np.diff(borders), tokens, borders[:-1] - start)
        spans, ends = self.document_ends(borders[:-1], np.diff(borders))
        return tokens, ends + (borders[:-1] - start)[spans]

    def read_spans(
        self, starts: np.ndarray, lengths: np.ndarray, out: np.ndarray, places: np.ndarray
    ) -> None:
        """Tokens [starts[i], starts[i] + lengths[i]) of the stream → out[places[i]:…].

        out: 1-D, contiguous, of `dtype`; each span lies within one shard.
        Raises ShardError for a shard that cannot be read, or that holds ids outside the vocabulary.
        """
        samples = np.searchsorted(self._sample_starts, starts, side="right") - 1
        itemsize = self._dtype.itemsize
        shards = self._shard_numbers[samples]
        opened = self._open.get(np.unique(shards).tolist())
        offsets = self._tokens_offsets[samples] + (starts - self._sample_starts[samples]) * itemsize
        fits = starts + lengths <= self._sample_starts[samples + 1]
        view = out.view(np.uint8).data
        sizes = lengths * itemsize
        # A loop of a microsecond a span: nothing but the read stands in it.
        missing = []
        span, preadv = 0, os.preadv
        try:
            for span, (descriptor, offset, begin, size) in enumerate(
                zip(
                    [opened[shard].descriptor for shard in shards.tolist()],
                    offsets.tolist(),
                    (places * itemsize).tolist(),
                    np.where(fits, sizes, 0).tolist(),
                    strict=True,
                )
            ):
                if preadv(descriptor, (view[begin : begin + size],), offset) != size:
                    missing.append(span)
        except OSError as error:
            raise opened[int(shards[span])].unreadable(error) from error
        for span in [*missing, *np.flatnonzero(~fits).tolist()]:
            begin = int(places[span]) * itemsize
            part = view[begin : begin + int(sizes[span])]
            self._read_over_samples(opened[int(shards[span])], int(starts[span]), int(lengths[span]), part)
        if out.size and int(out.max()) >= self._vocab_size:
            self._refuse_ids(starts, lengths, out, places, shards)

    def document_ends(self, starts: np.ndarray, lengths: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Where documents close in spans of the stream → (span, end) pairs, int64, ascending, with
        0 < end ≤ length: a document closes just before `end`. Each span lies within one shard."""
        shards = np.searchsorted(self.shard_starts, starts, side="right") - 1
        asked = np.unique(shards).tolist()
        opened = self._open.get(asked)
        together = self._open.all_ends(asked)
        if together is not None:
            return _ends_in_spans(together, starts, lengths)
        found = [
            (chosen, _ends_in_spans(opened[shard].ends, starts[chosen], lengths[chosen]))
            for shard in asked
            for chosen in [np.flatnonzero(shards == shard)]
        ]
        spans = np.concatenate([np.empty(0, np.int64), *(chosen[inner] for chosen, (inner, _) in found)])
        ends = np.concatenate([np.empty(0, np.int64), *(ends for _, (_, ends) in found)])
        order = np.argsort(spans, kind="stable")
        return spans[order], ends[order]

    def document_lengths(self) -> list[np.ndarray]:
        """Tokens of each document with its end, per shard. Raises DataError for a corpus without them."""
        if self._entry.lengths is None:
            remedy = "prepare the corpus again, or give data.packing=concat"
            where = self._place.name(MANIFEST_NAME)
            raise DataError(Problem(where, "a corpus of version 1, without lengths.npy", "", remedy))
        file, checksum = self._entry.lengths, self._entry.lengths_xxh3_128
        lengths = _read_array(self._place, file, checksum, LENGTHS_DTYPE, self.num_documents)
        counts = np.cumsum([shard.num_documents for shard in self._entry.shards])
        of_shards = np.split(lengths, counts[:-1])
        for shard, found in zip(self._entry.shards, of_shards, strict=True):
            tokens = int(found.sum(dtype=np.int64))
            if tokens != shard.num_tokens or not found.all():
                got = f"documents of {shard.file} of {tokens:,} tokens together"
                allowed = f"{shard.num_tokens:,}, each with one or more"
                raise DataError(Problem(self._place.name(file), got, allowed, PREPARE_AGAIN))
        return of_shards

    def lengths_of(self, shard: int) -> np.ndarray:
        """Tokens of each document of one shard with its end, int64; from the shard itself."""
        ends = self._open.get([shard])[shard].ends
        return np.diff(ends, prepend=self.shard_starts[shard])

    def want(self, shards: Sequence[int]) -> None:
        """These will be read soon, in this order."""
        self._place.want([self._entry.shards[shard] for shard in shards])

    def find_bad(self, shards: Iterable[int]) -> list[int]:
        """Which of these cannot be read, each looked at as if it were read now."""
        bad = []
        for shard in shards:
            try:
                self._open.open_anew(shard)
            except ShardError:
                bad.append(shard)
        return bad

    def _read_over_samples(self, opened: OpenShard, start: int, length: int, part: memoryview) -> None:
        """A span that reaches over arrays of a shard, which headers part."""
        sample = int(np.searchsorted(self._sample_starts, start, side="right")) - 1
        itemsize = self._dtype.itemsize
        while length > 0:
            sample_start, sample_stop = self._sample_starts[sample : sample + 2].tolist()
            taken = min(length, sample_stop - start)
            offset = int(self._tokens_offsets[sample]) + (start - sample_start) * itemsize
            self._read_again(opened, part[: taken * itemsize], offset)
            part, start, length, sample = part[taken * itemsize :], start + taken, length - taken, sample + 1

    def _read_again(self, opened: OpenShard, part: memoryview, offset: int) -> None:
        while part:
            count = opened.readv(part, offset)
            if count == 0:
                got = f"a shard that ends before byte {offset + len(part)}"
                raise ShardError(Problem(opened.name, got, f"{opened.entry.bytes} bytes", PREPARE_AGAIN))
            part, offset = part[count:], offset + count

    def _refuse_ids(
        self,
        starts: np.ndarray,
        lengths: np.ndarray,
        out: np.ndarray,
        places: np.ndarray,
        shards: np.ndarray,
    ) -> None:
        for start, length, place, shard in zip(starts, lengths, places, shards, strict=True):
            span = out[place : place + length]
            for at in np.flatnonzero(span >= self._vocab_size)[:1]:
                name = self.shard_names[shard]
                token = int(start + at - self.shard_starts[shard])
                allowed = f"0 to {self._vocab_size - 1}, the vocabulary of its corpus"
                got = f"the token id {span[at]} at token {token:,}"
                raise ShardError(Problem(name, got, allowed, PREPARE_AGAIN))


def _ends_in_spans(
    ends: np.ndarray, starts: np.ndarray, lengths: np.ndarray
) -> tuple[np.ndarray, np.ndarray]:
    """(span, end within it) of each of the ascending `ends` in (starts[i], starts[i] + lengths[i]]."""
    first = np.searchsorted(ends, starts, side="right")
    counts = np.searchsorted(ends, starts + lengths, side="right") - first
    spans = np.repeat(np.arange(len(starts)), counts)
    places = np.arange(len(spans)) + np.repeat(first - (np.cumsum(counts) - counts), counts)
    return spans, ends[places] - starts[spans]


def _tokenizer(place: Place, manifest: Manifest) -> Path:
    """The tokenizer as a local file."""
    entry = manifest.tokenizer
    content = place.read(entry.file, TOKENIZER_BYTES)
    sha256 = hashlib.sha256(content).hexdigest()
    if sha256 != entry.sha256:
        got = f"an altered tokenizer (sha256 {sha256})"
        raise DataError(Problem(place.name(entry.file), got, f"sha256 {entry.sha256}", PREPARE_AGAIN))
    return place.local(entry.file, content)


def _read_array(place: Place, file: str, xxh3_128: str | None, dtype: np.dtype, length: int) -> np.ndarray:
    """An array of the corpus, which is held in memory. Raises DataError for another than is expected, and for
    one that would take more than is free."""
    where, size = place.name(file), length * dtype.itemsize
    if size > (free := psutil.virtual_memory().available):
        raise DataError(Problem(where, f"{size:,} bytes", f"{free:,}, the memory that is free"))
    content = place.read(file, size + _LONGEST_HEADER, xxh3_128)
    try:
        array = parse_array(content)
        if array.dtype != dtype or array.shape != (length,):
            raise ValueError(f"an array of {array.dtype} of the shape {array.shape}")
    except ValueError as error:
        raise DataError(Problem(where, str(error), f"{length:,} of {dtype}", PREPARE_AGAIN)) from None
    return array


def _read_index(place: Place, entry: SplitEntry, dtype: np.dtype) -> np.ndarray:
    """Raises DataError unless each array that it names lies within its shard."""
    index = _read_array(place, entry.index, entry.index_xxh3_128, INDEX_DTYPE, entry.num_samples)
    sizes = np.array([shard.bytes for shard in entry.shards], dtype=np.uint64)
    numbers = index["shard"]
    # Sorted, since a shard's samples are looked up by halving.
    fits = numbers < len(sizes)
    fits[1:] &= numbers[1:] >= numbers[:-1]
    room = sizes[np.where(fits, numbers, 0)] if len(sizes) else np.zeros(len(index), np.uint64)
    for offset, count, itemsize in (
        ("tokens_offset", "num_tokens", dtype.itemsize),
        ("ends_offset", "num_documents", ENDS_DTYPE.itemsize),
    ):
        begins = index[offset]
        fits &= (begins >= NPY_HEADER_BYTES) & (begins <= room)
        fits &= index[count] <= (room - np.minimum(begins, room)) // np.uint64(itemsize)
    if not fits.all():
        got = f"a sample {int(np.argmin(fits)):,} that lies in no shard"
        raise DataError(Problem(place.name(entry.index), got, "samples of its shards", PREPARE_AGAIN))
    return index


def _check_index(place: Place, entry: SplitEntry, found: np.ndarray, expected: np.ndarray) -> None:
    """Raise DataError unless the index gives each shard as many tokens as the manifest does."""
    wrong = np.flatnonzero(found != expected)
    if len(wrong):
        shard = entry.shards[max(0, int(wrong[0]) - 1)]
        got = f"another number of tokens in {shard.file} than the manifest's"
        raise DataError(Problem(place.name(entry.index), got, f"{shard.num_tokens:,}", PREPARE_AGAIN))


def _refuse(found: list[Problem]) -> None:
    if len(found) > _MOST_PROBLEMS:
        more = Problem("corpus", f"{len(found) - _MOST_PROBLEMS} more files like these", "", PREPARE_AGAIN)
        found = [*found[:_MOST_PROBLEMS], more]
    if found:
        raise DataError(found)
