"""Join words that often stand together (Mikolov et al. 2013, arXiv:1310.4546, section 4)."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import numpy as np

from llmtrain import files
from llmtrain.vectors.pair_counts import PairCounts

MOST_PAIRS = 1 << 23
PIECE = 1 << 20
RARE = -2
JOINT = "_"


def join_phrases(
    text: Path, words: list[str], counts: np.ndarray, min_count: int, threshold: float, *, is_last: bool
) -> tuple[list[str], np.ndarray]:
    """Rewrite the text, int32 rows of `words`, with phrases in place of their two words; return the words,
    with the phrases, and their counts, the most frequent first. Words that become rarer than `min_count` are
    then RARE; the last pass leaves rare words out.

    A pair that occurs n_ab times is a phrase if (n_ab − min_count) · total / (n_a · n_b) is above the
    threshold. From left to right, a word belongs to one phrase only."""
    tokens = np.memmap(text, np.int32, mode="r")
    pairs = PairCounts(len(words), text.parent / "phrases", MOST_PAIRS)
    for start in range(0, len(tokens), PIECE):
        piece = np.array(tokens[start : start + PIECE + 1])
        a, b = piece[:-1], piece[1:]
        both = (a >= 0) & (b >= 0)
        pairs.add(a[both], b[both], 1.0)
    total = float(counts.sum())
    keys: list[np.ndarray] = []
    names: list[str] = []
    for first, second, number in pairs.ranges():
        score = (number - min_count) * total / (counts[first].astype(float) * counts[second])
        chosen = (number >= min_count) & (score > threshold)
        keys.append(first[chosen].astype(np.int64) * len(words) + second[chosen])
        names += [f"{words[a]}{JOINT}{words[b]}" for a, b in zip(first[chosen], second[chosen], strict=True)]
    # A phrase may have the name of a word that the text has already.
    rows = {word: row for row, word in enumerate(words)}
    together = [*words]
    targets = np.empty(len(names), np.int64)
    for i, name in enumerate(names):
        if name not in rows:
            rows[name] = len(together)
            together.append(name)
        targets[i] = rows[name]
    chosen_keys = np.concatenate([*keys, np.empty(0, np.int64)])
    found = np.zeros(len(together), np.int64)
    joined = text.with_name(f"{text.name}.joined")
    with open(joined, "wb") as file:
        for piece in _joined(tokens, len(words), chosen_keys, targets):
            file.write(piece.tobytes())
            found += np.bincount(piece[piece >= 0], minlength=len(together))
    kept = np.flatnonzero(found >= min_count)
    kept = kept[np.lexsort((np.array(together)[kept], -found[kept]))]
    new_rows = np.full(len(together) + 2, RARE, np.int32)
    new_rows[kept] = np.arange(len(kept))
    new_rows[-1] = -1  # a border stays one
    before = np.memmap(joined, np.int32, mode="r")
    del tokens
    with files.atomic_writer(text) as out:
        for start in range(0, len(before), PIECE):
            piece = new_rows[before[start : start + PIECE]]
            out.write((piece[piece != RARE] if is_last else piece).tobytes())
    joined.unlink()
    return [together[row] for row in kept], found[kept]


def _joined(
    tokens: np.ndarray, num_words: int, keys: np.ndarray, targets: np.ndarray
) -> Iterator[np.ndarray]:
    """Yield the text in pieces with phrases in place of their two words."""
    carried = np.empty(0, np.int32)
    for start in range(0, len(tokens), PIECE):
        piece = np.concatenate([carried, tokens[start : start + PIECE]])
        is_last = start + PIECE >= len(tokens)
        a, b = piece[:-1].astype(np.int64), piece[1:].astype(np.int64)
        pair = np.where((a >= 0) & (b >= 0), a * num_words + b, -1)
        at = np.searchsorted(keys, pair)
        at = np.minimum(at, max(len(keys) - 1, 0))
        is_phrase = (keys[at] == pair) if len(keys) else np.zeros(len(pair), bool)
        # Of phrases that overlap, every second one of a row of them counts.
        begins = np.flatnonzero(is_phrase)
        chosen = _every_second(begins)
        out = piece.copy()
        out[chosen] = targets[at[chosen]] if len(chosen) else out[chosen]
        keep = np.ones(len(piece), bool)
        keep[chosen + 1] = False
        if is_last:
            yield out[keep]
            return
        # The last word may begin a phrase with the first of the next piece.
        took_last = len(chosen) and chosen[-1] == len(piece) - 2
        carried = np.empty(0, np.int32) if took_last else piece[-1:]
        if not took_last:
            keep[-1] = False
        yield out[keep]


def _every_second(begins: np.ndarray) -> np.ndarray:
    """Return the 1st, 3rd, 5th … of each run of consecutive numbers."""
    if not len(begins):
        return begins
    is_first = np.concatenate([[True], np.diff(begins) > 1])
    firsts = begins[is_first]
    return begins[(begins - firsts[np.cumsum(is_first) - 1]) % 2 == 0]
