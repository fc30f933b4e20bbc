"""Which rows stand for all: the choice of examples that a prompt shows."""

from __future__ import annotations

import numpy as np


def chosen_rows(labels: np.ndarray, count: int, seed: int, skip: int = 0) -> np.ndarray:
    """Return the numbers of `count` random rows that have each label in turn, as long as it has rows left, in
    random order; fewer if there are fewer rows. skip: leave out those that are chosen with count=skip."""
    draw = np.random.default_rng(seed)
    order = draw.permutation(len(labels))
    # The place of each row among those of its label.
    places = np.zeros(len(labels), np.int64)
    for label in np.unique(labels):
        own = order[labels[order] == label]
        places[own] = np.arange(len(own))
    in_turn = order[np.argsort(places[order], kind="stable")]
    return draw.permutation(in_turn[skip : skip + count])
