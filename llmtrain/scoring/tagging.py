"""Figures of tagging: entities that tags spell (CoNLL-2003's evaluation), and words.

Entities are read as seqeval and conlleval do: B-X begins one of type X, I-X continues one of the same type
or, where there is none, begins one.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np

from llmtrain.scoring.classification import confusion
from llmtrain.scoring.figure import RESAMPLES, Figure, bootstrap
from llmtrain.scoring.report import Report, classes_of, of_class

FIGURES = ("entity_f1", "accuracy", "entity_precision", "entity_recall")


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


def tag_figures(
    predicted: Sequence[Sequence[str]], truth: Sequence[Sequence[str]], intervals: bool = True
) -> dict[str, Figure]:
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

    return bootstrap(of_rows, len(table), RESAMPLES if intervals else 0)


def tag_report(
    predicted: Sequence[Sequence[str]], truth: Sequence[Sequence[str]], names: Sequence[str]
) -> Report:
    """Return the confusion of the tags of words, and precision, recall and F1 of each type of entity, or of
    each tag where the tags spell none."""
    numbers = {name: number for number, name in enumerate(names)}
    said_W = np.array([numbers[tag] for tags in predicted for tag in tags], np.int64)
    there_W = np.array([numbers[tag] for tags in truth for tag in tags], np.int64)
    matrix = confusion(said_W, there_W, len(names))
    of_type: dict[str, list[int]] = {}
    for said, there in zip(predicted, truth, strict=True):
        ours, theirs = set(entities(said)), set(entities(there))
        for found, place in ((ours & theirs, 0), (ours, 1), (theirs, 2)):
            for entity in found:
                of_type.setdefault(entity.type, [0, 0, 0])[place] += 1
    if not any(theirs for _, _, theirs in of_type.values()):
        return Report(tuple(names), classes_of(matrix, names), matrix)
    classes = {kind: of_class(*of_type[kind]) for kind in sorted(of_type)}
    return Report(tuple(names), classes, matrix)
