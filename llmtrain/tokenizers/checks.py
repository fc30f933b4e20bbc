"""What a tokenizer of others' making may not ask for: ids far behind its vocabulary, and texts that grow
beyond all memory. Its library checks neither, and answers some mistakes by a Rust panic, which no
`except Exception` catches, and the lack of memory by the end of the process.
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
"""Four times the largest tokenizer.json that models are known to come with."""
VOCABULARY_BYTES = 8 << 20
"""Of vocab.txt, vocab.json and merges.txt, which only older tokenizers have."""
MOST_GROWTH = 100
"""Times that a text may grow before it is cut, or after it was joined, by what replaces its parts."""
MOST_CHARSMAP_BYTES = 256
"""Of what stands for a character; the longest of Unicode's compatibility forms has 33."""
MOST_WORD_CHARS = 10_000
"""Of a word that WordPieces are looked for in; the time for one grows with their square."""
MOST_PIECE_CHARS = 8192
"""Of a piece of a vocabulary; known ones have some hundred spaces at most."""
MOST_PATTERN_CHARS = 1 << 16
"""Of a regular expression; known ones have some hundreds."""
MOST_ADDED_IDS = 1000
"""Around a text by a tokenizer's template; known ones put two or three."""
MOST_MARK_CHARS = 16
"""Of what every piece within a word, or at its end, has besides its text."""
_FREE_IDS = 1 << 16
_WORD = 4
_SILENCE = threading.Lock()


def check_ids(largest: int, entries: int, where: str) -> None:
    """Raise DataError for a largest id of which most ids before it would stand for nothing: tables have a row
    for each."""
    allowed = 2 * entries + _FREE_IDS
    if largest >= allowed:
        got = f"the id {largest:,} in a vocabulary of {entries:,}"
        raise DataError(Problem(where, got, f"ids below {allowed:,}"))


def check_charsmap(charsmap: bytes) -> None:
    """Raise ValueError for a sentencepiece table of replacements that is damaged: the bytes of a trie, their
    number before them, and texts behind it, each with a zero at its end."""
    size = int.from_bytes(charsmap[:_WORD], "little")
    if len(charsmap) < _WORD or size > len(charsmap) - _WORD or size % _WORD:
        raise ValueError(f"a precompiled_charsmap of {len(charsmap):,} bytes that says {size:,}")
    longest = max(map(len, charsmap[_WORD + size :].split(b"\0")))
    if longest > MOST_CHARSMAP_BYTES:
        raise ValueError(f"a precompiled_charsmap with {longest:,} bytes for a character")


def check_steps(spec: dict[str, Any]) -> None:
    """Raise ValueError for steps before and after the model of a tokenizer.json that make texts too long, for
    marks of the model that do, and for words of any length where it takes the square of it."""
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
            raise ValueError(f"{key}: steps within steps, too many") from None
        if growth > MOST_GROWTH:
            raise ValueError(f"{key}: steps that make texts {growth:,.0f} times as long")


def _check_lengths(spec: dict[str, Any], model: dict[str, Any]) -> None:
    """Raise ValueError for a piece or an added token that is longer than any is: what the library makes of
    them grows with the square of it."""
    vocabulary, added = model.get("vocab"), spec.get("added_tokens")
    listed = vocabulary if isinstance(vocabulary, (dict, list)) else ()
    pieces = [piece[0] if isinstance(piece, list) and piece else piece for piece in listed]
    listed = added if isinstance(added, list) else ()
    pieces += [token.get("content") for token in listed if isinstance(token, dict)]
    longest = max((len(piece) for piece in pieces if isinstance(piece, str)), default=0)
    if longest > MOST_PIECE_CHARS:
        raise ValueError(f"a piece of {longest:,} characters, more than {MOST_PIECE_CHARS:,}")


def _added_by(step: Any) -> int:
    """How many ids a post-processor puts around a text, or around two."""
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
    cuts so many bytes off unseen, and ends the process where it thereby cut a character."""
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
    """Times that a text may grow in a step and those within it, however the step is called."""
    if isinstance(step, list):
        return prod(map(_growth, step))
    if not isinstance(step, dict):
        return 1.0
    # A character beyond the first 128 becomes two, each of which is one of them.
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
            raise ValueError(f"a precompiled_charsmap that is no base64: {error}") from None
    return own * prod(_growth(part) for part in step.values() if isinstance(part, dict | list))


@contextmanager
def library_errors(where: str, got: str, allowed: str) -> Iterator[None]:
    """Raise DataError for what the `tokenizers` library raises in here, panics among it."""
    try:
        yield
    except (DataError, MemoryError):
        raise
    except BaseException as error:
        # Its panics are no Exception, so that nobody catches them by mistake.
        if not isinstance(error, Exception) and type(error).__name__ != "PanicException":
            raise
        reason = " ".join(str(error).split())[:200]
        raise DataError(Problem(where, f"{got} ({reason})", allowed)) from error


@contextmanager
def without_stderr() -> Iterator[None]:
    """Keep what the process writes to its standard error in here to itself: a panic writes several lines
    before anybody can catch it."""
    # Of two threads at once, one would put back what the other had put there. A fork may leave the lock held.
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
    """Send what is written to the standard error nowhere; return where it went, None where it is closed."""
    try:
        kept = os.dup(2)
    except OSError:
        return None
    null = os.open(os.devnull, os.O_WRONLY)
    os.dup2(null, 2)
    os.close(null)
    return kept
