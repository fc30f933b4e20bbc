"""A name that a mapping of an override holds twice is refused."""

from __future__ import annotations

import pytest

from llmtrain.cli.repeated import refuse_repeated, repeated_names
from llmtrain.errors import ConfigError


@pytest.mark.parametrize(
    ("text", "names"),
    [
        ("{a: 1, b: 2}", []),
        ("{a: 1, b: 2, a: 3}", ["a"]),
        ("{a: {kind: x}, b: {kind: x}}", []),
        ("{a: {kind: x, kind: y}, a: {}}", ["kind", "a"]),
        ("{a: s3://x/a:b, b: 'a: 1, a: 2', c: [{a: 1}, {a: 2}]}", []),
        ("{a: [1, 2], b: 2, b: [{c: 1, c: 2}]}", ["b", "c"]),
    ],
)
def test_names(text: str, names: list[str]) -> None:
    assert repeated_names(text) == names


def test_tasks_of_one_name() -> None:
    with pytest.raises(ConfigError) as caught:
        refuse_repeated(["train.steps=3", "objective.tasks={topic: {kind: tagging}, topic: {kind: tagging}}"])
    assert str(caught.value) == "objective.tasks: got the name topic twice; allowed: each name once"
