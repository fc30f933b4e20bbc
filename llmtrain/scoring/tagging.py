"""Figures of tagging: entities that tags spell (CoNLL-2003's evaluation), and words.

Entities are read as seqeval and conlleval do: B-X begins one of type X, I-X continues one of the same type
or, where there is none, begins one.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np

from llmtrain.scoring.figure import RESAMPLES, Figure, bootstrap


class Entity(NamedTuple):
    """The words [first, end) of a row, of one type."""

    first: int
    end: int
    type: str


def entities(tags: Sequence[str]) -> list[Entity]:
    """Return the entities that the tags of a row spell, in order. Other schemes of the same spirit are read
    too: E and L end an entity, S and U are one of a single word."""
    found: list[Entity] = []
    begun: int | None = None
    kind = ""
    for position, tag in enumerate([*tags, "O"]):
        prefix, _, of_tag = tag.partition("-")
        goes_on = begun is not None and of_tag == kind and prefix in ("I", "E", "L", "M")
        if begun is not None and not goes_on:
            found.append(Entity(begun, position, kind))
            begun = None
        if prefix != "O" and begun is None:
            begun, kind = position, of_tag
        if begun is not None and prefix in ("E", "L", "S", "U"):
            found.append(Entity(begun, position + 1, kind))
            begun = None
    return found


def tag_figures(predicted: Sequence[Sequence[str]], truth: Sequence[Sequence[str]]) -> dict[str, Figure]:
    """Return precision, recall and F1 of entities (micro), if there are any, and the accuracy of words."""
    counts = []
    for said, there in zip(predicted, truth, strict=True):
        ours, theirs = set(entities(said)), set(entities(there))
        right = sum(a == b for a, b in zip(said, there, strict=True))
        counts.append((len(ours & theirs), len(ours), len(theirs), right, len(there)))
    table = np.array(counts, np.int64).reshape(-1, 5)

    def of_rows(rows: np.ndarray) -> dict[str, float]:
        hits, said, there, right, words = table[rows].sum(0).tolist()
        found = {"accuracy": right / max(1, words)}
        if table[:, 2].any():
            found |= {
                "entity_precision": hits / said if said else 0.0,
                "entity_recall": hits / there if there else 0.0,
                "entity_f1": 2 * hits / (said + there) if said + there else 0.0,
            }
        return found

    return bootstrap(of_rows, len(table), RESAMPLES)
