"""What ranks compare at the start, and how they report differences."""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor
from importlib import metadata

import pytest
import torch.distributed as dist
from hypothesis import given
from hypothesis import strategies as st

from llmtrain.distributed import launcher
from llmtrain.distributed.agreement import Fact, check_ranks_agree, disagreements, format_ranks, run_facts
from llmtrain.errors import ConfigError, LaunchError


def facts(**values: object) -> dict[str, Fact]:
    return {key: Fact(value, f"mend {key}") for key, value in values.items()}


def told(*ranks: dict[str, Fact]) -> list[str]:
    return [str(problem) for problem in disagreements(ranks)]


def test_ranks_alike_have_nothing_to_tell():
    assert told(facts(a=1, b=[1.5, None]), facts(a=1, b=[1.5, None])) == []


def test_most_ranks_are_right():
    ranks = [facts(lr=0.1), *[facts(lr=0.2)] * 3]
    assert told(*ranks) == ["rank 0: lr: got 0.1, the other 3 ranks have 0.2; mend lr"]
    ranks = [
        facts(name="a", seed=0),
        facts(name="b", seed=0),
        facts(name="b", seed=1),
        facts(name="b", seed=0),
    ]
    assert told(*ranks) == [
        "rank 0: name: got a, the other 3 ranks have b; mend name",
        "rank 2: seed: got 1, the other 3 ranks have 0; mend seed",
    ]


def test_rank_0_breaks_a_tie():
    assert told(facts(a=9), facts(a=1)) == ["rank 1: a: got 1, the other rank has 9; mend a"]
    ranks = [facts(a=2), facts(a=1), facts(a=1), facts(a=2)]
    assert told(*ranks) == ["ranks 1-2: a: got 1, the other 2 ranks have 2; mend a"]


def test_several_other_values():
    ranks = [facts(a=value) for value in [1, 1, 2, 1, 3, 2]]
    assert told(*ranks) == [
        "ranks 2, 5: a: got 2, 3 ranks have 1; mend a",
        "rank 4: a: got 3, 3 ranks have 1; mend a",
    ]


def test_a_rank_without_a_fact():
    assert told(facts(a=1), facts(a=1, b=2), facts(a=1)) == [
        "rank 1: b: got 2, the other 2 ranks have null; mend b"
    ]


def test_equal_numbers_of_other_types_differ():
    """As true and 1 do in a configuration."""
    assert told(facts(a=1), facts(a=True), facts(a=1)) == [
        "rank 1: a: got true, the other 2 ranks have 1; mend a"
    ]


@given(st.lists(st.sampled_from("abc"), min_size=2, max_size=9))
def test_every_rank_that_differs_is_named_once(values: list[str]):
    problems = disagreements([facts(key=value) for value in values])
    named = " ".join(problem.where.partition(":")[0] for problem in problems)
    usual = len(values) - sum(map(_count, named.replace("ranks", "").replace("rank", "").split()))
    assert usual == max(map(values.count, values))


def _count(part: str) -> int:
    first, _, last = part.strip(",").partition("-")
    return int(last or first) - int(first) + 1


def test_ranks_are_named_by_stretches():
    assert format_ranks([3]) == "rank 3"
    assert format_ranks([0, 1, 2, 5, 7, 8]) == "ranks 0-2, 5, 7-8"


def test_facts_of_a_run():
    config = {
        "optimizer": {"lr": 0.1, "betas": [0.9, 0.95]},
        "data": {"path": "/here", "workers": 2},
        "seed": 1,
    }
    found = {key: fact.value for key, fact in run_facts(config, "cpu", "f00d").items()}
    assert found.pop("version of torch") == metadata.version("torch")
    versions = {key for key in found if key.startswith("version of ")}
    assert versions == {f"version of {name}" for name in ("python", "llmtrain", "deepspeed")}
    assert {key: value for key, value in found.items() if key not in versions} == {
        "optimizer.lr": 0.1,
        "optimizer.betas": [0.9, 0.95],
        "data.workers": 2,
        "seed": 1,
        "device type": "cpu",
        "content of data.path": "f00d",
    }


def meeting(*facts_of_ranks: dict[str, Fact], size: int | None = None, seconds: float = 30) -> list[object]:
    """What each rank, a thread here, comes back with."""
    store = dist.HashStore()

    def one(rank: int) -> object:
        try:
            check_ranks_agree(store, rank, size or len(facts_of_ranks), facts_of_ranks[rank], seconds)
        except LaunchError as error:
            return error
        return None

    with ThreadPoolExecutor(len(facts_of_ranks)) as pool:
        return list(pool.map(one, range(len(facts_of_ranks))))


def test_a_meeting_of_ranks_alike():
    assert meeting(*[facts(a=1)] * 5) == [None] * 5


def test_all_ranks_hear_of_a_difference():
    heard = meeting(facts(a=1), facts(a=1), facts(a=2))
    assert {str(error) for error in heard} == {"rank 2: a: got 2, the other 2 ranks have 1; mend a"}
    assert all(isinstance(error, LaunchError) and error.everywhere for error in heard)


def test_all_ranks_hear_who_is_missing():
    heard = meeting(facts(a=1), facts(a=1), size=4, seconds=0.5)
    assert len({str(error) for error in heard}) == 1
    assert str(heard[0]).startswith("start: got 2 of 4 ranks within 0.5 s, not ranks 2-3; ")


@pytest.mark.parametrize("text", ["soon", "0", "-1", "inf", "nan"])
def test_a_wrong_start_timeout(text: str, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setenv("START_TIMEOUT", text)
    with pytest.raises(ConfigError, match="START_TIMEOUT"):
        launcher.start_seconds()


def test_start_timeout(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.delenv("START_TIMEOUT", raising=False)
    assert launcher.start_seconds() == launcher.START_SECONDS
    monkeypatch.setenv("START_TIMEOUT", "1.5")
    assert launcher.start_seconds() == 1.5
