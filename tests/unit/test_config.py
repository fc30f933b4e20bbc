"""Decoding: types, unknown keys, all problems at once."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

import pytest
from hypothesis import given
from hypothesis import strategies as st

from llmtrain.config import decode, encode, require
from llmtrain.errors import ConfigError, Problem, nearest


@dataclass(frozen=True)
class Inner:
    rate: float = 0.1
    kind: Literal["a", "b"] = "a"

    def problems(self) -> Iterator[Problem]:
        yield from require(self.rate > 0, "rate", self.rate, "above 0")


@dataclass(frozen=True)
class Outer:
    steps: int
    inner: Inner
    name: str = "x"
    flag: bool = False
    path: Path | None = None
    pair: tuple[float, float] = (0.0, 1.0)
    names: tuple[str, ...] = ()
    shares: Mapping[str, float] = field(default_factory=dict)


def problems(mapping: dict) -> list[str]:
    with pytest.raises(ConfigError) as caught:
        decode(Outer, mapping)
    return [f"{p.where}: {p.got}" for p in caught.value.problems]


def test_decodes_what_yaml_gives():
    outer = decode(
        Outer,
        {
            "steps": 3.0,
            "inner": {"rate": "1e-3", "kind": "b"},
            "name": 7,
            "flag": True,
            "path": "~/x",
            "pair": [1, 2],
            "names": "one",
            "shares": {"web": 1},
        },
    )
    assert outer.steps == 3
    assert isinstance(outer.steps, int)
    assert outer.inner == Inner(1e-3, "b")
    assert outer.name == "7"
    assert outer.path == Path("~/x").expanduser()
    assert outer.pair == (1.0, 2.0)
    assert outer.names == ("one",)
    assert outer.shares == {"web": 1.0}


def test_all_problems_come_together_with_their_keys():
    assert problems({"inner": {"rate": -1.0, "kindd": "a"}, "flag": "yes", "stepps": 1}) == [
        "stepps: an unknown key",
        "steps: nothing",
        "inner.kindd: an unknown key",
        "flag: 'yes'",
    ]
    assert problems({"steps": 1, "inner": {"rate": -1.0}}) == ["inner.rate: -1.0"]


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("steps", 1.5),
        ("steps", True),
        ("steps", float("nan")),
        ("steps", float("inf")),
        ("steps", None),
        ("steps", "???"),
        ("steps", 10**30),
        ("pair", [float("nan"), 1.0]),
        ("pair", [1.0, "inf"]),
        ("shares", {"web": float("inf")}),
        ("path", ""),
        ("path", 2024),
        ("flag", 1),
        ("pair", [1]),
        ("inner", 3),
        ("name", None),
        ("shares", [1]),
    ],
)
def test_wrong_types_are_named(key: str, value: object):
    (found,) = problems({"steps": 1, "inner": {}, key: value})
    assert found.startswith(key)


@given(
    st.builds(
        Outer,
        st.integers(-(10**12), 10**12),
        st.builds(Inner, st.floats(1e-9, 1e9), st.sampled_from(["a", "b"])),
        st.text(),
        st.booleans(),
        st.none(),
        st.tuples(*[st.floats(allow_nan=False, allow_infinity=False)] * 2),
    )
)
def test_encode_is_the_way_back(outer: Outer):
    assert decode(Outer, encode(outer)) == outer


def test_question_marks_stand_for_nothing_only_where_something_is_needed():
    assert decode(Outer, {"steps": 1, "inner": {}, "name": "???"}).name == "???"


def test_whole_numbers_end_below_2_to_the_63():
    assert decode(Outer, {"steps": 2**63 - 1, "inner": {}}).steps == 2**63 - 1
    with pytest.raises(ConfigError, match=r"steps: got 9223372036854775808; allowed: .*2\^63"):
        decode(Outer, {"steps": 2**63, "inner": {}})


def test_unknown_keys_come_with_the_sections_own():
    with pytest.raises(ConfigError, match=r"inner\.ratee: got an unknown key; allowed: rate, kind;"):
        decode(Outer, {"steps": 1, "inner": {"ratee": 1}})


def test_few_names_are_shown_whole_and_each_once():
    assert nearest("no", ["fp32", "bf16", "fp16", "fp16"]) == "fp32, bf16, fp16"
    assert nearest("valid", ["train", "validation", "test"]) == "validation, train, test"
    many = [f"name{i}" for i in range(12)]
    assert nearest("name3", many).startswith("name3, ")
    assert nearest("zzz", many) == ", ".join(sorted(many))
    assert len(nearest("zzz", [f"name{i}" for i in range(100)]).split(", ")) == 3


def test_a_problem_is_one_line():
    assert str(Problem("a.b", "x\ny", "1  or 2", "do\tthis")) == "a.b: got x y; allowed: 1 or 2; do this"
