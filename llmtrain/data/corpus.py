"""Reads a corpus that `llmtrain prepare` wrote: a manifest, a tokenizer, and token shards per split.

A split is one long stream of token ids, documents in order, each closed by the end-of-document id.
The stream lies in tar shards as arrays of whole documents ("samples"); `index.npy` gives each array's
byte offset, so that any window of the stream is a few positioned reads. Positioned reads rather than
memory maps: they release the interpreter while the disk works, and a file that shrinks during a run
is an error with a name instead of a bus error.
"""

from __future__ import annotations

import fcntl
import hashlib
import json
import os
import threading
from collections import OrderedDict
from collections.abc import Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np

from llmtrain.data.shards import ENDS_DTYPE, INDEX_DTYPE
from llmtrain.errors import DataError, Problem, nearest
from llmtrain.files import checksum, write_json_atomically

FORMAT = "llmtrain-corpus"
VERSION = 1
MANIFEST_NAME = "manifest.json"
STAMP_NAME = ".verified.json"
UNFINISHED_NAME = ".prepare"
"""Folder in which `llmtrain prepare` keeps its work until the corpus is whole."""
_PREPARE_AGAIN = "prepare the corpus again with llmtrain prepare, or copy it again"
_MOST_PROBLEMS = 5


@dataclass(frozen=True)
class TokenizerEntry:
    file: str
    sha256: str


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


class TokenSplit:
    """One split's token stream. Safe to read from several threads."""

    def __init__(self, root: Path, name: str, manifest: Manifest, max_open_files: int = 128) -> None:
        self.name = name
        self._entry = manifest.splits[name]
        self._fingerprint = manifest.fingerprint
        self._dtype = np.dtype(manifest.dtype).newbyteorder("<")
        index = _read_index(root, self._entry)
        self._shard_numbers = index["shard"]
        self._tokens_offsets = index["tokens_offset"]
        self._ends_offsets = index["ends_offset"]
        self._document_counts = index["num_documents"]
        self._sample_starts = np.zeros(len(index) + 1, dtype=np.int64)
        np.cumsum(index["num_tokens"], out=self._sample_starts[1:])
        self._files = _OpenFiles(root, self._entry.shards, max_open_files)

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

    def read(self, start: int, stop: int) -> tuple[np.ndarray, np.ndarray]:
        """Tokens [start, stop) of the stream, and the document ends inside.

        Returns (tokens, uint16 or uint32 [stop − start]; ends, int64, ascending, relative to start: a
        document closes just before each, 0 < end ≤ stop − start).
        Raises IndexError for a window outside the stream, DataError for a shard that cannot be read.
        """
        if not 0 <= start <= stop <= self.num_tokens:
            raise IndexError(f"window [{start}, {stop}) outside the {self.num_tokens} tokens of {self.name}")
        tokens = np.empty(stop - start, dtype=self._dtype)
        ends: list[np.ndarray] = []
        position = start
        sample = int(np.searchsorted(self._sample_starts, start, side="right")) - 1
        while position < stop:
            sample_start, sample_stop = map(int, self._sample_starts[sample : sample + 2])
            piece = tokens[position - start : min(stop, sample_stop) - start]
            shard = int(self._shard_numbers[sample])
            offset = int(self._tokens_offsets[sample]) + (position - sample_start) * self._dtype.itemsize
            self._files.read_into(piece, shard, offset)
            sample_ends = np.empty(int(self._document_counts[sample]), dtype=ENDS_DTYPE)
            self._files.read_into(sample_ends, shard, int(self._ends_offsets[sample]))
            first, last = np.searchsorted(
                sample_ends, (position - sample_start, position - sample_start + len(piece)), side="right"
            )
            ends.append(sample_ends[first:last].astype(np.int64) + (sample_start - start))
            position += len(piece)
            sample += 1
        return tokens, np.concatenate(ends) if ends else np.empty(0, dtype=np.int64)


class Corpus:
    """A prepared corpus; `Corpus.open` makes one."""

    def __init__(self, path: Path, manifest: Manifest) -> None:
        self.path = path
        self.manifest = manifest

    @classmethod
    def open(cls, path: str | Path, verify: Literal["size", "checksum"] = "size") -> Corpus:
        """Open a corpus and check that it is whole.

        Always: the manifest, the tokenizer's hash, and the size of every shard. `checksum` also reads
        the shards that have changed since they were last read whole (see `verify`).
        Raises DataError with the files that are missing, truncated or altered.
        """
        path = Path(path)
        corpus = cls(path, _read_manifest(path))
        _check_tokenizer(corpus.tokenizer_path, corpus.manifest.tokenizer)
        _refuse(_size_problems(path, corpus._shards()))
        if verify == "checksum":
            corpus.verify()
        return corpus

    @property
    def tokenizer_path(self) -> Path:
        """The sentencepiece model."""
        return self.path / self.manifest.tokenizer.file

    def split(self, name: str) -> TokenSplit:
        """Raises DataError for a split that does not exist or holds no token, and for an altered index."""
        entry = self.manifest.splits.get(name)
        if entry is None:
            known = list(self.manifest.splits)
            raise DataError(Problem(str(self.path), f"no split {name!r}", nearest(name, known)))
        if entry.num_tokens == 0:
            remedy = "prepare more text, or a larger share for this split"
            raise DataError(Problem(str(self.path), f"an empty split {name!r}", "one token or more", remedy))
        return TokenSplit(self.path, name, self.manifest)

    def verify(self) -> None:
        """Compare every shard with its checksum.

        A stamp beside the manifest remembers what was found good (size and times of each file), so that
        only the first start reads the shards, and of many processes that start together only one does;
        a folder that cannot be written is read at each start by each.
        Raises DataError naming the altered shards.
        """
        stamp_path = self.path / STAMP_NAME
        with _one_at_a_time(self.path / MANIFEST_NAME):
            stamps = _read_stamps(stamp_path)
            unseen = [shard for shard in self._shards() if stamps.get(shard.file) != _stamp(self.path, shard)]
            if not unseen:
                return
            # The stamp is taken before reading, so that a change while reading is seen next time.
            new_stamps = {shard.file: _stamp(self.path, shard) for shard in unseen}
            _refuse(self._altered(unseen))
            known = {shard.file for shard in self._shards()}
            kept = {file: stamp for file, stamp in stamps.items() if file in known}
            # A corpus that cannot be written (shared, read-only) is still good; it is read again next time.
            with suppress(OSError):
                write_json_atomically(stamp_path, kept | new_stamps)

    def _altered(self, shards: list[ShardEntry]) -> Iterator[Problem]:
        with ThreadPoolExecutor(max_workers=min(8, os.cpu_count() or 1)) as pool:
            checksums = pool.map(lambda shard: _shard_checksum(self.path / shard.file), shards)
            for shard, xxh3_128 in zip(shards, checksums, strict=True):
                if xxh3_128 != shard.xxh3_128:
                    got = "an altered shard: its content does not match its checksum"
                    allowed = f"xxh3_128 {shard.xxh3_128}"
                    yield Problem(str(self.path / shard.file), got, allowed, _PREPARE_AGAIN)

    def _shards(self) -> Iterator[ShardEntry]:
        for entry in self.manifest.splits.values():
            yield from entry.shards


class _File:
    """An open file that closes when its last reader lets go of it."""

    __slots__ = ("descriptor",)

    def __init__(self, path: Path) -> None:
        self.descriptor = -1
        self.descriptor = os.open(path, os.O_RDONLY)

    def __del__(self) -> None:
        if self.descriptor >= 0:
            os.close(self.descriptor)


class _OpenFiles:
    """The shards read last, kept open; bounded, since a corpus has more shards than a process has files."""

    def __init__(self, root: Path, shards: tuple[ShardEntry, ...], capacity: int) -> None:
        self._root = root
        self._shards = shards
        self._capacity = capacity
        self._files: OrderedDict[int, _File] = OrderedDict()
        self._lock = threading.Lock()

    def read_into(self, array: np.ndarray, shard: int, offset: int) -> None:
        """Fill `array` with the bytes at `offset` of a shard; raises DataError if they can't be had."""
        file = self._get(shard)
        view = array.view(np.uint8).data
        try:
            while view:
                count = os.preadv(file.descriptor, [view], offset)
                if count == 0:
                    got = f"a shard that ends before byte {offset + len(view)}"
                    allowed = f"{self._shards[shard].bytes} bytes"
                    raise DataError(Problem(self._path(shard), got, allowed, _PREPARE_AGAIN))
                view, offset = view[count:], offset + count
        except OSError as error:
            raise DataError(Problem(self._path(shard), f"{error.strerror} while reading")) from error

    def _get(self, shard: int) -> _File:
        with self._lock:
            if file := self._files.get(shard):
                self._files.move_to_end(shard)
                return file
        try:
            file = _File(self._root / self._shards[shard].file)
            size = os.fstat(file.descriptor).st_size
        except OSError as error:
            raise DataError(_unreadable(self._path(shard), error)) from error
        if size != self._shards[shard].bytes:
            raise DataError(_wrong_size(self._path(shard), size, self._shards[shard].bytes))
        with self._lock:
            self._files[shard] = file
            if len(self._files) > self._capacity:
                self._files.popitem(last=False)
        return file

    def _path(self, shard: int) -> str:
        return str(self._root / self._shards[shard].file)


def _read_manifest(path: Path) -> Manifest:
    manifest_path = path / MANIFEST_NAME
    try:
        raw = json.loads(manifest_path.read_text(encoding="utf-8"))
    except (FileNotFoundError, NotADirectoryError):
        raise DataError(_not_a_corpus(path)) from None
    except OSError as error:
        raise DataError(_unreadable(str(manifest_path), error)) from error
    except ValueError:
        raise DataError(
            Problem(str(manifest_path), "text that is not JSON", "a corpus manifest", _PREPARE_AGAIN)
        ) from None
    if not isinstance(raw, dict) or raw.get("format") != FORMAT:
        got = repr(raw.get("format")) if isinstance(raw, dict) else "no mapping"
        raise DataError(Problem(str(manifest_path), f"format {got}", FORMAT, "give the folder of a corpus"))
    if raw.get("version") != VERSION:
        remedy = "prepare the corpus again with this llmtrain, or use the llmtrain that wrote it"
        got = f"version {raw.get('version')!r}"
        raise DataError(Problem(str(manifest_path), got, f"version {VERSION}", remedy))
    try:
        return _decode_manifest(raw)
    except (KeyError, TypeError, ValueError, AttributeError) as error:
        got = f"an altered manifest ({type(error).__name__}: {error})"
        raise DataError(
            Problem(str(manifest_path), got, f"a manifest of version {VERSION}", _PREPARE_AGAIN)
        ) from error


def _decode_manifest(raw: Mapping[str, Any]) -> Manifest:
    if raw["dtype"] not in ("uint16", "uint32"):
        raise ValueError(f"dtype {raw['dtype']!r}")
    splits = {}
    for name, split in raw["splits"].items():
        shards = tuple(
            ShardEntry(**{f: shard[f] for f in ShardEntry.__dataclass_fields__}) for shard in split["shards"]
        )
        totals = {f: split[f] for f in SplitEntry.__dataclass_fields__ if f != "shards"}
        splits[name] = SplitEntry(**totals, shards=shards)
    return Manifest(
        vocab_size=int(raw["vocab_size"]),
        eos_id=int(raw["eos_id"]),
        dtype=raw["dtype"],
        tokenizer=TokenizerEntry(raw["tokenizer"]["file"], raw["tokenizer"]["sha256"]),
        fingerprint=str(raw["fingerprint"]),
        splits=splits,
    )


def _not_a_corpus(path: Path) -> Problem:
    remedy = "make one with: llmtrain prepare source=… output=…"
    if not path.exists():
        return Problem(str(path), "no such folder", "a corpus", remedy)
    if not path.is_dir():
        return Problem(str(path), "a file", "the folder of a corpus", remedy)
    if (path / UNFINISHED_NAME).exists():
        return Problem(str(path), "an unfinished corpus", "a whole one", "run its llmtrain prepare again")
    names = sorted(entry.name for entry in os.scandir(path))
    shown = ", ".join(names[:4]) + (f" and {len(names) - 4} more" if len(names) > 4 else "")
    got = f"a folder without {MANIFEST_NAME} (holds {shown or 'nothing'})"
    return Problem(str(path), got, "a corpus", remedy)


def _check_tokenizer(path: Path, entry: TokenizerEntry) -> None:
    try:
        sha256 = hashlib.sha256(path.read_bytes()).hexdigest()
    except OSError as error:
        raise DataError(_unreadable(str(path), error)) from error
    if sha256 != entry.sha256:
        got = f"an altered tokenizer (sha256 {sha256})"
        raise DataError(Problem(str(path), got, f"sha256 {entry.sha256}", _PREPARE_AGAIN))


def _read_index(root: Path, entry: SplitEntry) -> np.ndarray:
    path = root / entry.index
    try:
        if checksum(path) != entry.index_xxh3_128:
            got = "an altered index: its content does not match its checksum"
            raise DataError(Problem(str(path), got, f"xxh3_128 {entry.index_xxh3_128}", _PREPARE_AGAIN))
        index = np.load(path, mmap_mode="r", allow_pickle=False)
    except OSError as error:
        raise DataError(_unreadable(str(path), error)) from error
    if index.dtype != INDEX_DTYPE or len(index) != entry.num_samples:
        got = f"{len(index)} rows of {index.dtype}"
        raise DataError(Problem(str(path), got, f"{entry.num_samples} rows of {INDEX_DTYPE}", _PREPARE_AGAIN))
    return index


def _size_problems(root: Path, shards: Iterator[ShardEntry]) -> Iterator[Problem]:
    for shard in shards:
        path = os.path.join(root, shard.file)
        try:
            size = os.stat(path).st_size
        except OSError as error:
            yield _unreadable(path, error)
            continue
        if size != shard.bytes:
            yield _wrong_size(path, size, shard.bytes)


def _refuse(problems: Iterator[Problem]) -> None:
    found = list(problems)
    if len(found) > _MOST_PROBLEMS:
        more = Problem("corpus", f"{len(found) - _MOST_PROBLEMS} more files like these", "", _PREPARE_AGAIN)
        found = [*found[:_MOST_PROBLEMS], more]
    if found:
        raise DataError(found)


def _unreadable(path: str, error: OSError) -> Problem:
    if isinstance(error, FileNotFoundError):
        return Problem(path, "no such file", "a file of the corpus", _PREPARE_AGAIN)
    return Problem(path, str(error.strerror), "a readable file", "check its permissions and its disk")


def _wrong_size(path: str, size: int, expected: int) -> Problem:
    kind = "a truncated shard" if size < expected else "a shard that is too long"
    return Problem(path, f"{kind} of {size} bytes", f"{expected} bytes", _PREPARE_AGAIN)


def _shard_checksum(path: Path) -> str:
    try:
        return checksum(path)
    except OSError as error:
        raise DataError(_unreadable(str(path), error)) from error


def _stamp(root: Path, shard: ShardEntry) -> list[Any]:
    """What tells a file that was found good from a changed one; ctime also moves when mtime is set back."""
    try:
        status = os.stat(root / shard.file)
    except OSError as error:
        raise DataError(_unreadable(str(root / shard.file), error)) from error
    return [shard.xxh3_128, status.st_size, status.st_mtime_ns, status.st_ctime_ns]


@contextmanager
def _one_at_a_time(path: Path) -> Iterator[None]:
    """Hold a lock on `path` against other processes; none where the stamp that they wait for can't be
    written, or the file system has no locks."""
    with open(path, "rb") as file:
        if os.access(path.parent, os.W_OK):
            with suppress(OSError):
                fcntl.flock(file, fcntl.LOCK_EX)
        yield


def _read_stamps(path: Path) -> dict[str, list[Any]]:
    try:
        stamps = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return {}
    return stamps if isinstance(stamps, dict) else {}
