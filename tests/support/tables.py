"""A table of short texts, with what each task learns from."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest

WORDS = ["the", "film", "was", "a", "fine", "old", "tale", "of", "two", "men", "and", "one", "dog"]


@pytest.fixture(scope="module")
def rows(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """160 rows in random words: `text`, one of three numbers as `label`, `words` with `tags`, and a `short`
    text that follows from the first."""
    draw = np.random.default_rng(0)
    path = tmp_path_factory.mktemp("rows") / "rows.jsonl"
    with open(path, "w") as file:
        for number in range(160):
            words = [str(word) for word in draw.choice(WORDS, draw.integers(2, 30))]
            tags = ["B-X" if word == "film" else "O" for word in words]
            row = {"text": " ".join(words), "label": number % 3, "words": words, "tags": tags}
            row["short"] = " ".join(words[::-2])
            file.write(json.dumps(row) + "\n")
    return path
