"""Raw documents → clean UTF-8, at memory speed: documents are cleaned a joined batch at a time.

Cleaning removes control characters (newline and tab stay, CRLF and CR become newline), writes
U+2581, with which sentencepiece marks a space, as a space, normalizes Unicode, and drops documents
that hold nothing but white space.
"""

from __future__ import annotations

import re
import sys
import unicodedata
from collections.abc import Sequence
from dataclasses import dataclass, field, fields
from functools import lru_cache

import numpy as np
import xxhash

from llmtrain.prepare.streams import Pairs, Texts

# Record separator: a control character itself, so no clean document holds it, and Unicode composes
# nothing across it. In blocks it parts the sides of a pair.
SEPARATOR = "\x1e"
SEPARATOR_BYTE = SEPARATOR.encode()
# C0 without tab, newline, the separator; and DEL.
_CONTROLS = bytes(c for c in [*range(0x20), 0x7F] if chr(c) not in "\t\n" + SEPARATOR)
_SEPARATOR_TOO = _CONTROLS + SEPARATOR_BYTE
_CONTROLS_C1 = re.compile(rb"\xc2[\x80-\x9f]")  # U+0080 to U+009F in UTF-8
_SENTENCEPIECE_SPACE = "▁".encode()
_SURROGATES = re.compile("[\ud800-\udfff]")
LONGEST_MARKS = 256
"""Combining marks in a row that are put in order together. Unicode's own limit for streams is 30; putting n
of them in order takes n² steps."""


@dataclass
class CleanCounts:
    """What cleaning met; added up over batches, units and processes."""

    documents_read: int = 0
    """Pairs count as one, here and below."""
    empty_dropped: int = 0
    one_sided_dropped: int = 0
    """Pairs without a source or without a target."""
    documents_normalized: int = 0
    """Documents changed by Unicode normalization."""
    controls_removed: int = 0
    """Control characters removed."""
    spaces_replaced: int = 0
    """U+2581 replaced by a space."""
    surrogates_replaced: int = 0
    """Halves of surrogate pairs, which are no characters, replaced by U+FFFD."""
    tokenized: int = 0
    """Documents that came as token ids."""
    members_ignored: int = 0
    """Members of tars that hold no document."""
    members_repeated: int = 0
    """Members of tars that have another's key and ending, and are documents of their own."""
    quotes_kept: int = 0
    """Values in quotes where none mark values."""

    like_rows: dict[str, int] = field(default_factory=dict)
    """By the place of the first in each file, values whose lines look like rows."""
    filtered: dict[str, int] = field(default_factory=dict)
    """Documents dropped by each rule of the filters."""

    @property
    def filtered_text(self) -> str:
        return ", ".join(f"{rule} {count:,}" for rule, count in sorted(self.filtered.items()))

    def add(self, other: CleanCounts) -> None:
        for f in fields(self):
            ours, theirs = getattr(self, f.name), getattr(other, f.name)
            if isinstance(ours, dict):
                for key, count in theirs.items():
                    ours[key] = ours.get(key, 0) + count
            else:
                setattr(self, f.name, ours + theirs)


def clean(documents: Sequence[str] | Sequence[bytes], normalization: str, counts: CleanCounts) -> list[bytes]:
    """Clean UTF-8 documents in the given order, empty ones dropped; adds to `counts`.

    Raise UnicodeDecodeError for bytes that are no UTF-8.
    """
    cleaned = [text for text in _cleaned(documents, normalization, counts) if text]
    counts.documents_read += len(documents)
    counts.empty_dropped += len(documents) - len(cleaned)
    return cleaned


def clean_pairs(pairs: Pairs, normalization: str, counts: CleanCounts) -> list[bytes]:
    """Clean UTF-8 pairs in the given order, each its source, SEPARATOR and its target; those that lack
    either side dropped; adds to `counts`.

    Raise UnicodeDecodeError for bytes that are no UTF-8.
    """
    both = [*zip(*(_cleaned(side, normalization, counts) for side in pairs), strict=True)]
    cleaned = [SEPARATOR_BYTE.join(pair) for pair in both if all(pair)]
    empty = sum(not any(pair) for pair in both)
    counts.documents_read += len(both)
    counts.empty_dropped += empty
    counts.one_sided_dropped += len(both) - len(cleaned) - empty
    return cleaned


def _cleaned(documents: Texts, normalization: str, counts: CleanCounts) -> list[bytes]:
    """Every document, clean; nothing where it held white space alone."""
    if not documents:
        return []
    joined, surrogates = _join(documents)
    counts.surrogates_replaced += surrogates
    if joined.count(SEPARATOR_BYTE) != len(documents) - 1:
        joined = SEPARATOR_BYTE.join(
            _remove_controls(_join(documents[i : i + 1])[0], _SEPARATOR_TOO, counts)
            for i in range(len(documents))
        )
    else:
        joined = _remove_controls(joined, _CONTROLS, counts)
    if not joined.isascii():
        joined = _clean_beyond_ascii(joined, normalization, counts)
    stripped = (document.strip(b"\n") for document in joined.split(SEPARATOR_BYTE))
    return [b"" if text.isspace() else text for text in stripped]


def take_tokenized(documents: Sequence[np.ndarray], counts: CleanCounts) -> list[bytes]:
    """Bytes of documents that came as token ids, empty ones dropped; adds to `counts`."""
    kept = [ids.tobytes() for ids in documents if len(ids)]
    counts.documents_read += len(documents)
    counts.empty_dropped += len(documents) - len(kept)
    counts.tokenized += len(kept)
    return kept


def digests(documents: Sequence[bytes]) -> np.ndarray:
    """(documents, 2) uint64: the high and low halves of each document's xxh3_128."""
    packed = b"".join(map(xxhash.xxh3_128_digest, documents))
    return np.frombuffer(packed, dtype=">u8").astype(np.uint64).reshape(-1, 2)


def split_of(keys: np.ndarray, validation: float, test: float) -> np.ndarray:
    """(documents,) uint8 of 0 train, 1 validation, 2 test, from the low half of each document's hash."""
    position = keys.astype(np.float64) / 2.0**64
    return np.where(position < validation, 1, np.where(position < validation + test, 2, 0)).astype(np.uint8)


def _join(documents: Sequence[str] | Sequence[bytes]) -> tuple[bytes, int]:
    """UTF-8 of all, and in how many places U+FFFD was put for what it cannot hold."""
    if isinstance(documents[0], bytes):
        return SEPARATOR_BYTE.join(documents), 0  # type: ignore[arg-type]
    text = SEPARATOR.join(documents)  # type: ignore[arg-type]
    try:
        return text.encode(), 0
    except UnicodeEncodeError:
        # JSON may escape half of a surrogate pair.
        text, count = _SURROGATES.subn("\ufffd", text)
        return text.encode(), count


def _remove_controls(text: bytes, controls: bytes, counts: CleanCounts) -> bytes:
    if b"\r" in text:
        text = text.replace(b"\r\n", b"\n").replace(b"\r", b"\n")
    length = len(text)
    text = text.translate(None, controls)
    counts.controls_removed += length - len(text)
    return text


def _clean_beyond_ascii(joined: bytes, normalization: str, counts: CleanCounts) -> bytes:
    text = joined.decode()
    joined, removed = _CONTROLS_C1.subn(b"", joined)
    replaced = joined.count(_SENTENCEPIECE_SPACE)
    if replaced:
        joined = joined.replace(_SENTENCEPIECE_SPACE, b" ")
    counts.controls_removed += removed
    counts.spaces_replaced += replaced
    if normalization == "none":
        return joined
    form = normalization.upper()
    text = joined.decode() if removed or replaced else text
    normalize = _normalized_in_pieces if _has_many_marks(text) else unicodedata.normalize
    # It takes as long as to normalize, where marks may be out of order.
    if normalize is unicodedata.normalize and unicodedata.is_normalized(form, text):  # type: ignore[arg-type]
        return joined
    documents = text.split(SEPARATOR)
    normalized = [normalize(form, document) for document in documents]  # type: ignore[arg-type]
    counts.documents_normalized += sum(a != b for a, b in zip(documents, normalized, strict=True))
    return SEPARATOR.join(normalized).encode()


def _has_many_marks(text: str) -> bool:
    """Whether more than LONGEST_MARKS combining marks may stand in a row: then two in a row of every
    LONGEST_MARKS // 2th character are some."""
    some = text[:: LONGEST_MARKS // 2]
    if some.isascii():
        return False
    are_marks = _is_mark()[np.frombuffer(some.encode("utf-32-le"), "<u4")]
    return bool((are_marks[1:] & are_marks[:-1]).any())


@lru_cache
def _is_mark() -> np.ndarray:
    """For each character whether it combines with others."""
    return np.array([unicodedata.combining(chr(code)) != 0 for code in range(sys.maxunicode + 1)])


def _normalized_in_pieces(form: str, text: str) -> str:
    """Normalized but for runs of marks, of which LONGEST_MARKS at a time are put in order."""
    pieces, start, marks = [], 0, 0
    for place, character in enumerate(text):
        marks = marks + 1 if unicodedata.combining(character) else 0
        if marks > LONGEST_MARKS:
            pieces.append(unicodedata.normalize(form, text[start:place]))  # type: ignore[arg-type]
            start, marks = place, 1
    return "".join(pieces) + unicodedata.normalize(form, text[start:])  # type: ignore[arg-type]
