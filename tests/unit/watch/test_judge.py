"""Who is behind, from what each rank notes."""

from __future__ import annotations

from dataclasses import replace

import pytest

from llmtrain.watch import kernel
from llmtrain.watch.config import WatchConfig
from llmtrain.watch.judge import limit_of, who_is_behind
from llmtrain.watch.layout import Call, RankState
from llmtrain.watch.report import headline, report

WORLD, TENSOR_0, TENSOR_1, DATA_0, DATA_1, PAIR = 1, 2, 3, 4, 5, 6
LOCAL = {rank: f"node{rank // 2}" for rank in range(4)}


def state(rank: int, call: Call | None = None, **more: object) -> RankState:
    counts = {} if call is None else {call.key: call.number}
    base = RankState(rank, LOCAL[rank], 100 + rank, 1, 50, step=3, micro=0, phase="backward", is_warm=True)
    return replace(base, call=call, counts=counts, **more)


def call(key: int, ranks: tuple[int, ...], number: int, waits: bool = True, kind: str = "all_reduce") -> Call:
    return Call(kind, key, ranks, number, 4096, waits, 9.0)


def test_a_rank_that_computes_while_others_wait():
    everyone = (0, 1, 2, 3)
    states = [state(rank, call(WORLD, everyone, 7)) for rank in (0, 1, 3)]
    states.insert(2, state(2, call(WORLD, everyone, 6, waits=False)))
    verdict = who_is_behind(states)
    assert verdict.behind == (2,)
    assert str(headline(states, verdict, 54.0, LOCAL)) == (
        "rank 2 on node1: got no progress for 54 s in backward of micro-batch 0 of step 3: it is the rank "
        "for which the others wait; ranks 0-1, 3 wait in all_reduce number 7 of ranks 0-3, 4,096 bytes, in "
        "backward of micro-batch 0 of step 3"
    )
    text = report(states, verdict, 54.0, LOCAL)
    assert text.index("rank 2 on node1") < text.index("ranks 0-1, 3 on node0, node1")
    assert "rank 2 has not begun it" in text


def test_a_chain_of_groups_leads_to_its_end():
    states = [
        state(0, call(TENSOR_0, (0, 1), 5)),
        state(1, call(DATA_1, (1, 3), 2)),
        state(2, call(TENSOR_1, (2, 3), 5)),
        state(3, call(TENSOR_1, (2, 3), 4, waits=False)),
    ]
    assert who_is_behind(states).behind == (3,)


def test_a_stage_that_waits_for_the_one_before():
    states = [state(0), state(1, call(PAIR, (0, 1), 3, kind="recv"))]
    assert who_is_behind(states).behind == (0,)


def test_ranks_that_wait_for_each_other():
    states = [state(0, call(DATA_0, (0, 1), 5)), state(1, call(WORLD, (0, 1), 5))]
    verdict = who_is_behind(states)
    assert (verdict.behind, verdict.why) == ((0, 1), "which wait for each other")


def test_a_rank_that_went_another_way():
    """It left out a collective, and waits for all others in the next one, of another group."""
    others = [state(rank, call(WORLD, (0, 1, 2, 3), 8)) for rank in (0, 2, 3)]
    verdict = who_is_behind([*others, state(1, call(DATA_0, (0, 1, 2, 3), 5))])
    assert (verdict.behind, "elsewhere" in verdict.why) == ((1,), True)


@pytest.mark.parametrize("process", [kernel.STOPPED, kernel.ENDED, kernel.STATES["D"]])
def test_a_process_that_cannot_go_on_comes_first(process: str):
    states = [state(0), state(1, call(WORLD, (0, 1), 5), process=process)]
    verdict = who_is_behind(states)
    assert verdict.behind == (1,)
    assert process in verdict.why or process == kernel.ENDED


def test_nobody_is_behind_if_all_wait_at_one_place():
    states = [state(rank, call(WORLD, (0, 1), 5)) for rank in (0, 1)]
    assert who_is_behind(states).behind == ()
    assert "network" in str(headline(states, who_is_behind(states), 9.0, {0: "a", 1: "b"}))


def test_limits_are_those_of_the_slowest_phase():
    config = WatchConfig(hang_seconds=60, save_seconds=900, evaluation_seconds=0, start_seconds=300)
    assert limit_of(config, [state(0), state(1)]) == 60
    assert limit_of(config, [state(0), state(1, phase="save")]) == 900
    assert limit_of(config, [state(0), state(1, phase="evaluation")]) == float("inf")
    assert limit_of(config, [state(0), state(1, is_warm=False)]) == 300
    assert limit_of(config, [state(0), state(1, phase="save", process=kernel.STOPPED)]) == 60


def test_a_debugger_may_take_its_time():
    debugged = state(1, stack=[("a.py", 1, "f"), ("/usr/lib/python3.11/bdb.py", 90, "dispatch_line")])
    assert limit_of(WatchConfig(), [state(0), debugged]) == float("inf")
