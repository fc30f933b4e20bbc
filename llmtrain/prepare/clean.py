"""Clean raw documents to normalized UTF-8, at memory speed: a batch is joined and cleaned as one string.

Cleaning removes control characters (newline and tab stay, CRLF and CR become newline), replaces U+2581, by
which sentencepiece marks a space, with a space, normalizes Unicode, and drops documents of white space only.
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

from llmtrain.prepare.source_file import Pairs, Texts

# Record separator: a control character, so that no clean document contains it and Unicode normalization does
# not compose across it. In document blocks it separates the texts of a pair.
SEPARATOR = "\x1e"
SEPARATOR_BYTE = SEPARATOR.encode()
# C0 without tab, newline, the separator; and DEL.
_CONTROLS = bytes(c for c in [*range(0x20), 0x7F] if chr(c) not in "\t\n" + SEPARATOR)
_SEPARATOR_TOO = _CONTROLS + SEPARATOR_BYTE
_CONTROLS_C1 = re.compile(rb"\xc2[\x80-\x9f]")  # U+0080 to U+009F in UTF-8
_SENTENCEPIECE_SPACE = "▁".encode()
_SURROGATES = re.compile("[\ud800-\udfff]")
LONGEST_MARKS = 256
"""Maximum number of consecutive combining marks that are reordered together: reordering n marks takes n²
steps. The Unicode limit for streams is 30."""


@dataclass
class CleanCounts:
    """Counts of cleaning, summed over batches, units and processes."""

    documents_read: int = 0
    """A pair counts as one document, here and below."""
    empty_dropped: int = 0
    one_sided_dropped: int = 0
    """Pairs with an empty source or an empty target."""
    documents_normalized: int = 0
    """Documents changed by Unicode normalization."""
    controls_removed: int = 0
    """Control characters removed."""
    spaces_replaced: int = 0
    """U+2581 replaced by a space."""
    surrogates_replaced: int = 0
    """Lone surrogates, which are not characters, replaced by U+FFFD."""
    tokenized: int = 0
    """Documents given as token ids."""
    members_ignored: int = 0
    """Members of tar files without a document."""
    members_repeated: int = 0
    """Members of tar files that repeat key and extension of the previous one, and are separate documents."""
    quotes_kept: int = 0
    """Values enclosed in quotes that were kept, because quotes are part of the text."""

    like_rows: dict[str, int] = field(default_factory=dict)
    """Quoted values whose lines look like rows, by the location of the first in each file."""
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
    """Return the cleaned documents as UTF-8, in order, without empty ones; add to `counts`.

    Raise UnicodeDecodeError for bytes that are not UTF-8.
    """
    cleaned = [text for text in cleaned_texts(documents, normalization, counts) if text]
    counts.documents_read += len(documents)
    counts.empty_dropped += len(documents) - len(cleaned)
    return cleaned


def clean_pairs(pairs: Pairs, normalization: str, counts: CleanCounts) -> list[bytes]:
    """Return the cleaned pairs as UTF-8 (source, SEPARATOR, target), in order, without pairs with an empty
    text; add to `counts`.

    Raise UnicodeDecodeError for bytes that are not UTF-8.
    """
    both = [*zip(*(cleaned_texts(side, normalization, counts) for side in pairs), strict=True)]
    cleaned = [SEPARATOR_BYTE.join(pair) for pair in both if all(pair)]
    empty = sum(not any(pair) for pair in both)
    counts.documents_read += len(both)
    counts.empty_dropped += empty
    counts.one_sided_dropped += len(both) - len(cleaned) - empty
    return cleaned


def cleaned_texts(documents: Texts, normalization: str, counts: CleanCounts) -> list[bytes]:
    """Return all documents cleaned; b"" for those of white space only."""
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
    """Return documents of token ids as bytes, without empty ones; add to `counts`."""
    kept = [ids.tobytes() for ids in documents if len(ids)]
    counts.documents_read += len(documents)
    counts.empty_dropped += len(documents) - len(kept)
    counts.tokenized += len(kept)
    return kept


def digests(documents: Sequence[bytes]) -> np.ndarray:
    """Return (documents, 2) uint64: the high and low half of the xxh3_128 of each document."""
    packed = b"".join(map(xxhash.xxh3_128_digest, documents))
    return np.frombuffer(packed, dtype=">u8").astype(np.uint64).reshape(-1, 2)


def split_of(keys: np.ndarray, validation: float, test: float) -> np.ndarray:
    """Return (documents,) uint8: 0 train, 1 validation, 2 test.

    keys: low half of the hash of each document; validation, test: shares of the documents.
    """
    share = keys.astype(np.float64) / 2.0**64
    return np.where(share < validation, 1, np.where(share < validation + test, 2, 0)).astype(np.uint8)


def _join(documents: Sequence[str] | Sequence[bytes]) -> tuple[bytes, int]:
    """Return the joined documents as UTF-8, and the number of lone surrogates replaced by U+FFFD."""
    if isinstance(documents[0], bytes):
        return SEPARATOR_BYTE.join(documents), 0  # type: ignore[arg-type]
    text = SEPARATOR.join(documents)  # type: ignore[arg-type]
    try:
        return text.encode(), 0
    except UnicodeEncodeError:
        # JSON escapes may denote a lone surrogate.
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
    # With many marks this test would take as long as the normalization.
    if normalize is unicodedata.normalize and unicodedata.is_normalized(form, text):  # type: ignore[arg-type]
        return joined
    documents = text.split(SEPARATOR)
    normalized = [normalize(form, document) for document in documents]  # type: ignore[arg-type]
    counts.documents_normalized += sum(a != b for a, b in zip(documents, normalized, strict=True))
    return SEPARATOR.join(normalized).encode()


def _has_many_marks(text: str) -> bool:
    """Return whether more than LONGEST_MARKS consecutive combining marks are possible: then two consecutive
    samples of every LONGEST_MARKS // 2th character are marks."""
    some = text[:: LONGEST_MARKS // 2]
    if some.isascii():
        return False
    are_marks = _is_mark()[np.frombuffer(some.encode("utf-32-le"), "<u4")]
    return bool((are_marks[1:] & are_marks[:-1]).any())


@lru_cache
def _is_mark() -> np.ndarray:
    """Return for each code point whether it is a combining mark."""
    return np.array([unicodedata.combining(chr(code)) != 0 for code in range(sys.maxunicode + 1)])


def _normalized_in_pieces(form: str, text: str) -> str:
    """Normalize, but reorder at most LONGEST_MARKS consecutive combining marks at a time."""
    pieces, start, marks = [], 0, 0
    for offset, character in enumerate(text):
        marks = marks + 1 if unicodedata.combining(character) else 0
        if marks > LONGEST_MARKS:
            pieces.append(unicodedata.normalize(form, text[start:offset]))  # type: ignore[arg-type]
            start, marks = offset, 1
    return "".join(pieces) + unicodedata.normalize(form, text[start:])  # type: ignore[arg-type]
