"""Configuration of method=features, without torch."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

from llmtrain.config import require
from llmtrain.errors import Problem

STRENGTHS = (1.0, 0.3, 0.1, 0.03, 0.01, 3e-3, 1e-3, 3e-4, 1e-4, 3e-5, 1e-5)


@dataclass(frozen=True)
class FeaturesConfig:
    """A head over the vectors of a frozen trunk, solved instead of trained step by step."""

    strengths: tuple[float, ...] = STRENGTHS
    """Strengths s of the penalty s/2 · |W|² beside the mean loss of a row, for vectors of mean 0 and
    variance 1 (s = 1 / (C · rows) for scikit-learn's C). They are tried from the strongest down, until three
    in a row have not lowered the validation loss; that of the lowest is taken."""
    max_iterations: int = 200
    """Most iterations of L-BFGS for one strength."""

    def problems(self) -> Iterator[Problem]:
        if not self.strengths:
            yield Problem("strengths", "[]", "one strength or more")
        for number, strength in enumerate(self.strengths):
            allowed = "more than 0, at most 1e6"
            yield from require(0.0 < strength <= 1e6, f"strengths[{number}]", strength, allowed)
        yield from require(self.max_iterations >= 1, "max_iterations", self.max_iterations, "1 or more")
