"""Open a corpus that `llmtrain prepare` wrote: a manifest, a tokenizer, and tar files of tokens per split."""

from __future__ import annotations

import hashlib
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Literal

from llmtrain.corpus.cache import Cache
from llmtrain.corpus.location import Folder, Location, Problems, RemoteLocation, not_a_corpus
from llmtrain.corpus.manifest import (
    MANIFEST_BYTES,
    MANIFEST_NAME,
    PREPARE_AGAIN,
    Manifest,
    parse_manifest,
)
from llmtrain.corpus.token_split import TokenSplit
from llmtrain.errors import DataError, Problem, nearest
from llmtrain.tokenizers.checks import TOKENIZER_BYTES

_MOST_PROBLEMS = 5


class Corpus:
    """A prepared corpus; `Corpus.open` makes one."""

    def __init__(self, location: Location, manifest: Manifest, tokenizer_path: Path) -> None:
        self.location = location
        self.manifest = manifest
        self.tokenizer_path = tokenizer_path
        """The argument of `load_tokenizer`."""
        self.bad_tars: Problems = {}
        """Tar files found bad when the corpus was opened with on_bad_tar="skip"."""

    @classmethod
    def open(
        cls,
        path: str | Path,
        verify: Literal["size", "checksum"] = "size",
        *,
        on_bad_tar: Literal["error", "skip"] = "error",
        cache: Cache | None = None,
    ) -> Corpus:
        """Open the corpus in a folder or, given a cache, behind a URL, and check that it is complete.

        Always checked are the manifest, the hash of the tokenizer, and in a folder the size of every tar
        file. `checksum` also reads the tar files that have changed since they were last read whole. Remote
        files are compared with their checksum after download. Raises DataError with the files that are
        missing, truncated or altered.
        """
        location: Location
        if cache is not None:
            location = RemoteLocation(str(path), cache)
        else:
            location = Folder(Path(path))
            if not os.path.isfile(Path(path) / MANIFEST_NAME):
                raise DataError(not_a_corpus(Path(path)))
        content = location.read(MANIFEST_NAME, MANIFEST_BYTES)
        manifest = parse_manifest(content, location.name(MANIFEST_NAME))
        corpus = cls(location, manifest, _tokenizer(location, manifest))
        tars = [tar for split in manifest.splits.values() for tar in split.shards]
        found = location.find_problems(tars, checksums=verify == "checksum")
        if found and on_bad_tar == "error":
            raise DataError(_shortened(list(found.values())))
        corpus.bad_tars = found
        return corpus

    @property
    def where(self) -> str:
        """The name of the corpus in messages."""
        return self.location.name("").rstrip("/")

    def split(self, name: str) -> TokenSplit:
        """Return a split. Raises DataError for one that does not exist or holds no text, and for an altered
        index."""
        entry = self.manifest.splits.get(name)
        if entry is None:
            known = list(self.manifest.splits)
            raise DataError(Problem(self.where, f"no split {name!r}", nearest(name, known)))
        if entry.num_tokens == 0:
            remedy = "prepare more text, or a larger share for this split"
            raise DataError(Problem(self.where, f"an empty split {name!r}", "one token or more", remedy))
        if not entry.has_text:
            got = f"a split {name!r} of {entry.num_documents:,} documents without any token"
            remedy = "prepare it again, from text that its tokenizer knows or with another tokenizer.model"
            raise DataError(Problem(self.where, got, "one token or more", remedy))
        found = self.bad_tars
        bad = {number: found[tar.file] for number, tar in enumerate(entry.shards) if tar.file in found}
        return TokenSplit(self.location, name, self.manifest, bad_tars=bad)


def _tokenizer(location: Location, manifest: Manifest) -> Path:
    """Return the path of the tokenizer as a local file. Raises DataError for an altered one."""
    entry = manifest.tokenizer
    content = location.read(entry.file, TOKENIZER_BYTES)
    sha256 = hashlib.sha256(content).hexdigest()
    if sha256 != entry.sha256:
        got = f"an altered tokenizer (sha256 {sha256})"
        raise DataError(Problem(location.name(entry.file), got, f"sha256 {entry.sha256}", PREPARE_AGAIN))
    return location.local(entry.file, content)


def _shortened(found: Sequence[Problem]) -> list[Problem]:
    """Return the first problems, and one that counts the others."""
    shown = list(found[:_MOST_PROBLEMS])
    if len(found) > _MOST_PROBLEMS:
        more = f"{len(found) - _MOST_PROBLEMS} more files like these"
        shown.append(Problem("corpus", more, "", PREPARE_AGAIN))
    return shown
