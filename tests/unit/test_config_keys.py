"""Every key of every verb's typed configuration: what is said of a wrong value."""

from __future__ import annotations

import dataclasses
import typing
from typing import Any

import pytest

from llmtrain.commands import checkpoint, data, data_show
from llmtrain.commands.evaluate import EvaluateConfig
from llmtrain.commands.export import ExportConfig
from llmtrain.commands.generate import GenerateCommandConfig
from llmtrain.commands.import_ import ImportConfig
from llmtrain.config import decode, kinds_of, leaves
from llmtrain.errors import ConfigError, Problem
from llmtrain.nn.rope_config import RopeScaling
from llmtrain.prepare.config import PrepareConfig
from llmtrain.train.config import TrainConfig

CONFIGS = (
    *(TrainConfig, PrepareConfig, EvaluateConfig, GenerateCommandConfig, ImportConfig, ExportConfig),
    *(checkpoint.VerifyConfig, checkpoint.ShowConfig, checkpoint.DiffConfig, checkpoint.PruneConfig),
    *(data.TraceConfig, data.DigestConfig, data_show.ShowConfig),
)


def takes_null(hint: Any) -> bool:
    return type(None) in typing.get_args(hint)


OPTIONAL = {(leaf.key, leaf.hint) for config in CONFIGS for leaf in leaves(config) if takes_null(leaf.hint)}


@pytest.mark.parametrize(("key", "hint"), sorted(OPTIONAL, key=str), ids=lambda value: str(value)[:40])
def test_where_null_is_allowed_a_wrong_value_says_so(key: str, hint: Any):
    section = dataclasses.make_dataclass("section", [("value", hint)], frozen=True)
    with pytest.raises(ConfigError) as caught:
        decode(section, {"value": object()})
    (problem,) = caught.value.problems
    assert problem.where == "value"
    assert "null" in problem.allowed


def test_all_keys_are_looked_at():
    keys = {key for key, _ in OPTIONAL}
    assert {"evaluation.every", "model.rope_scaling.attention_factor", "data.path", "output"} <= keys
    assert len(keys) > 50


def sections(hint: Any, around: frozenset[Any] = frozenset()) -> set[type]:
    """The dataclasses that a config is made of. around: those that the hint is in, which may be its own."""
    if dataclasses.is_dataclass(hint):
        below = typing.get_type_hints(hint).values() if hint not in around else ()
        return {typing.cast(type, hint)}.union(*(sections(each, around | {hint}) for each in below))
    return set().union(*(sections(each, around) for each in [*typing.get_args(hint), *kinds_of(hint)]))


SECTIONS = sorted(set().union(*map(sections, CONFIGS)), key=str)


def refusals(section: type) -> list[Problem]:
    """What a section's own rules say of -1 in each key that may be null."""
    hints = typing.get_type_hints(section)
    found: list[Problem] = []
    for field in dataclasses.fields(section):
        if not takes_null(hints[field.name]) or field.default is dataclasses.MISSING:
            continue
        needed = {"kind": "linear"} if section is RopeScaling else {}
        try:
            decode(section, {**needed, field.name: -1})
        except ConfigError as error:
            found += [problem for problem in error.problems if problem.where == field.name]
    return found


@pytest.mark.parametrize("section", SECTIONS)
def test_rules_name_null_too(section: type):
    said = refusals(section)
    assert all("null" in problem.allowed for problem in said), said


def test_there_are_such_rules():
    assert sum(len(refusals(section)) for section in SECTIONS) >= 50


def test_what_is_allowed_is_named_once():
    with pytest.raises(ConfigError) as caught:
        decode(EvaluateConfig, {"checkpoint": "x", "data": 5})
    assert str(caught.value) == "data: got 5; allowed: a section of keys"
