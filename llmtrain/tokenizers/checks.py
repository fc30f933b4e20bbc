"""Check foreign tokenizers for contents that would exhaust memory or end the process.

The `tokenizers` library does not check for ids far beyond the vocabulary or for steps that multiply the
length of texts. It reports some errors by a Rust panic, which `except Exception` does not catch, and it ends
the process when memory runs out.
"""

from __future__ import annotations

import base64
import binascii
import os
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from math import prod
from typing import Any

from llmtrain.config import show
from llmtrain.errors import DataError, Problem

TOKENIZER_BYTES = 128 << 20
"""Maximum size of a tokenizer file; four times the largest known tokenizer.json."""
VOCABULARY_BYTES = 8 << 20
"""Maximum size of vocab.txt, vocab.json and merges.txt, which only older tokenizers have."""
MOST_GROWTH = 100
"""Maximum factor by which normalizer, pre-tokenizer or decoder may lengthen a text."""
MOST_CHARSMAP_BYTES = 256
"""Maximum bytes that replace a character; the longest Unicode compatibility form has 33."""
MOST_WORD_CHARS = 10_000
"""Maximum characters of a word for WordPiece, whose time grows with their square."""
MOST_PIECE_CHARS = 8192
"""Maximum characters of a piece of the vocabulary; the longest known pieces are some hundred spaces."""
MOST_PATTERN_CHARS = 1 << 16
"""Maximum characters of a regular expression; known ones have some hundreds."""
MOST_ADDED_IDS = 1000
"""Maximum number of ids that the post-processor adds to a text; known ones add two or three."""
MOST_MARK_CHARS = 16
"""Maximum characters of the mark of pieces within a word or at its end."""
_FREE_IDS = 1 << 16
_WORD = 4
_SILENCE = threading.Lock()


def check_ids(largest: int, entries: int, where: str) -> None:
    """Raise DataError if the largest id is far beyond the number of entries: tables have a row for every
    id."""
    allowed = 2 * entries + _FREE_IDS
    if largest >= allowed:
        got = f"the id {largest:,} in a vocabulary of {entries:,}"
        raise DataError(Problem(where, got, f"ids below {allowed:,}"))


def check_charsmap(charsmap: bytes) -> None:
    """Raise ValueError if a sentencepiece table of replacements is damaged. Its format: size of a trie, the
    trie, and zero-terminated texts."""
    size = int.from_bytes(charsmap[:_WORD], "little")
    if len(charsmap) < _WORD or size > len(charsmap) - _WORD or size % _WORD:
        raise ValueError(f"a precompiled_charsmap of {len(charsmap):,} bytes with a trie of {size:,}")
    longest = max(map(len, charsmap[_WORD + size :].split(b"\0")))
    if longest > MOST_CHARSMAP_BYTES:
        raise ValueError(f"a precompiled_charsmap with {longest:,} bytes for a character")


def check_steps(spec: dict[str, Any]) -> None:
    """Raise ValueError if steps or marks of a tokenizer.json make texts too long, or the model accepts words
    so long that their quadratic time is a problem."""
    model = spec["model"] if isinstance(spec.get("model"), dict) else {}
    longest = model.get("max_input_chars_per_word")
    if isinstance(longest, int) and longest > MOST_WORD_CHARS:
        raise ValueError(f"max_input_chars_per_word {show(longest)}, more than {MOST_WORD_CHARS:,}")
    for key in ("continuing_subword_prefix", "end_of_word_suffix"):
        mark = model.get(key)
        if isinstance(mark, str) and len(mark) > MOST_MARK_CHARS:
            raise ValueError(f"{key} of {len(mark):,} characters, more than {MOST_MARK_CHARS}")
    _check_lengths(spec, model)
    _check_merges(model)
    added = _added_by(spec.get("post_processor"))
    if added > MOST_ADDED_IDS:
        raise ValueError(f"post_processor: {added:,} ids around a text, more than {MOST_ADDED_IDS:,}")
    for key in ("normalizer", "pre_tokenizer", "decoder"):
        try:
            growth = _growth(spec.get(key))
        except RecursionError:
            raise ValueError(f"{key}: steps that are nested too deeply") from None
        if growth > MOST_GROWTH:
            raise ValueError(f"{key}: steps that make texts {growth:,.0f} times as long")


def _check_lengths(spec: dict[str, Any], model: dict[str, Any]) -> None:
    """Raise ValueError for a piece or added token that is too long: the library needs quadratic memory for
    it."""
    vocabulary, added = model.get("vocab"), spec.get("added_tokens")
    listed = vocabulary if isinstance(vocabulary, (dict, list)) else ()
    pieces = [piece[0] if isinstance(piece, list) and piece else piece for piece in listed]
    listed = added if isinstance(added, list) else ()
    pieces += [token.get("content") for token in listed if isinstance(token, dict)]
    longest = max((len(piece) for piece in pieces if isinstance(piece, str)), default=0)
    if longest > MOST_PIECE_CHARS:
        raise ValueError(f"a piece of {longest:,} characters, more than {MOST_PIECE_CHARS:,}")


def _added_by(step: Any) -> int:
    """Return the number of ids that a post-processor adds to a text or a pair of texts."""
    if not isinstance(step, dict):
        return 0
    steps = step.get("processors")
    tokens = step.get("special_tokens")
    counts: dict[Any, int] = {}
    if isinstance(tokens, dict):
        counts = {name: len(token["ids"]) for name, token in tokens.items() if _has_ids(token)}
    own = 0
    for template in (step.get("single"), step.get("pair")):
        for piece in template if isinstance(template, list) else ():
            token = piece.get("SpecialToken") if isinstance(piece, dict) else None
            name = token.get("id") if isinstance(token, dict) else None
            own += counts.get(name, 1) if isinstance(name, str) else 0
    return own + sum(map(_added_by, steps if isinstance(steps, list) else ()))


def _has_ids(token: Any) -> bool:
    return isinstance(token, dict) and isinstance(token.get("ids"), list)


def _check_merges(model: dict[str, Any]) -> None:
    """Raise ValueError for a merge whose second piece lacks the mark of pieces within a word: the library
    removes as many bytes without a check, and ends the process if that splits a character."""
    prefix, merges = model.get("continuing_subword_prefix"), model.get("merges")
    if not prefix or not isinstance(prefix, str) or not isinstance(merges, list):
        return
    for merge in merges:
        pieces = merge.split(" ") if isinstance(merge, str) else merge
        second = pieces[-1] if isinstance(pieces, list) and pieces else None
        if not isinstance(second, str) or not second.startswith(prefix):
            raise ValueError(f"the merge {show(merge)} whose second piece does not begin with {show(prefix)}")


def _check_pattern(pattern: Any) -> None:
    regex = pattern.get("Regex") if isinstance(pattern, dict) else None
    if isinstance(regex, str) and len(regex) > MOST_PATTERN_CHARS:
        raise ValueError(f"a pattern of {len(regex):,} characters, more than {MOST_PATTERN_CHARS:,}")


def _growth(step: Any) -> float:
    """Return the maximum factor by which a step and its nested steps lengthen a text, for any type of
    step."""
    if isinstance(step, list):
        return prod(map(_growth, step))
    if not isinstance(step, dict):
        return 1.0
    # ByteLevel turns a byte of 128 or more into a character of two bytes.
    own = 2.0 if step.get("type") == "ByteLevel" else 1.0
    content, pattern = step.get("content"), step.get("pattern")
    if isinstance(content, str) and pattern is not None:
        literal = pattern.get("String") if isinstance(pattern, dict) else pattern
        own *= max(1.0, len(content) / max(1, len(literal) if isinstance(literal, str) else 1))
    _check_pattern(pattern)
    if isinstance(step.get("prepend"), str):
        own *= 1 + len(step["prepend"])
    if isinstance(charsmap := step.get("precompiled_charsmap"), str):
        try:
            check_charsmap(base64.b64decode(charsmap, validate=True))
        except binascii.Error as error:
            raise ValueError(f"a precompiled_charsmap that is not base64: {error}") from None
    return own * prod(_growth(part) for part in step.values() if isinstance(part, dict | list))


@contextmanager
def library_errors(where: str, got: str, allowed: str) -> Iterator[None]:
    """Turn exceptions of the `tokenizers` library, including panics, into DataError."""
    try:
        yield
    except (DataError, MemoryError):
        raise
    except BaseException as error:
        # PanicException derives from BaseException.
        if not isinstance(error, Exception) and type(error).__name__ != "PanicException":
            raise
        reason = " ".join(str(error).split())[:200]
        raise DataError(Problem(where, f"{got} ({reason})", allowed)) from error


@contextmanager
def without_stderr() -> Iterator[None]:
    """Discard what the process writes to stderr in this block: a panic prints several lines before it can be
    caught."""
    # Two threads at once would restore each other's descriptor. A fork may leave the lock held, hence the
    # timeout.
    is_alone = _SILENCE.acquire(timeout=1)
    kept = _silenced() if is_alone else None
    try:
        yield
    finally:
        if kept is not None:
            os.dup2(kept, 2)
            os.close(kept)
        if is_alone:
            _SILENCE.release()


def _silenced() -> int | None:
    """Redirect stderr to /dev/null; return a duplicate of the old descriptor, None if stderr is closed."""
    try:
        kept = os.dup(2)
    except OSError:
        return None
    null = os.open(os.devnull, os.O_WRONLY)
    os.dup2(null, 2)
    os.close(null)
    return kept
