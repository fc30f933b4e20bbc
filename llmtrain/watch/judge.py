"""Decide which rank is behind when no rank makes progress. Pure functions of the ranks' states."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from llmtrain.watch import kernel
from llmtrain.watch.config import WatchConfig
from llmtrain.watch.layout import TAKES_PART, RankState

SILENT_SECONDS = 5.0
"""A rank whose watching thread gave no sign of life for so long is silent."""
WAITED_FOR = "for which the others wait"
DEBUGGERS = ("/bdb.py", "/pydevd.py")
"""Files of debuggers: a rank whose stack has a frame of one waits for a person."""
LONGER = 3.0
"""A run whose ranks have paused longer than the limit before is given so many times the longest pause."""


@dataclass(frozen=True)
class Verdict:
    """The ranks that are behind, and the reason."""

    behind: tuple[int, ...]
    """Ranks, ascending; empty if none can be told from the others."""
    why: str
    """Says so of these ranks, without their names."""


def limit_of(config: WatchConfig, states: Sequence[RankState]) -> float:
    """Return the seconds that the ranks may stay without progress: the longest limit of what any of them
    does; infinity if that has none. A rank that is stopped does nothing, so that the others wait in vain."""
    if any(state.process in (kernel.STOPPED, kernel.ENDED) for state in states):
        return config.hang_seconds
    seconds = [_limit(config, state) for state in states]
    return max(seconds, default=config.hang_seconds)


def _limit(config: WatchConfig, state: RankState) -> float:
    limits = {
        "evaluation": config.evaluation_seconds,
        "save": config.save_seconds,
        "end": config.save_seconds,
    }
    seconds = limits.get(state.phase)
    if seconds is None:
        seconds = config.hang_seconds
        if state.phase == "data":
            seconds = max(seconds, config.data_seconds) if config.data_seconds else 0
        if not state.is_warm:
            seconds = max(seconds, config.start_seconds) if config.start_seconds else 0
    is_debugged = any(file.endswith(DEBUGGERS) for file, _, _ in state.stack)
    return float("inf") if is_debugged or seconds == 0 else seconds


def who_is_behind(states: Sequence[RankState]) -> Verdict:
    """Return the ranks that the others wait for. states: those of the ranks that take part still."""
    for is_so, why in (
        (lambda state: state.process == kernel.ENDED, "whose process has ended"),
        (lambda state: state.process == kernel.STOPPED, f"whose process is {kernel.STOPPED}"),
        (_sleeps, f"whose process is {kernel.STATES['D']}"),
        (_is_silent, "which has given no sign of life for some time"),
    ):
        found = _ranks(state for state in states if is_so(state))
        if found and (len(found) < len(states) or len(states) == 1):
            return Verdict(found, why)
    waits = waits_for(states)
    waited_for = {rank for ranks in waits.values() for rank in ranks}
    if behind := sorted(waited_for - set(waits)):
        return Verdict(tuple(behind), WAITED_FOR)
    if waited_for:
        # Of ranks that wait for each other, the one that most others wait for has gone another way.
        waiting = Counter(rank for ranks in waits.values() for rank in ranks)
        most = max(waiting.values())
        odd = tuple(sorted(rank for rank, count in waiting.items() if count == most))
        if len(odd) < len(waited_for):
            return Verdict(odd, "for which the most others wait, while it waits for them elsewhere")
        return Verdict(tuple(sorted(waited_for)), "which wait for each other")
    if len(states) == 1:
        return Verdict((states[0].rank,), "which is alone")
    busy = _ranks(state for state in states if state.call is None or not state.call.waits)
    if busy and len(busy) < len(states):
        return Verdict(busy, "which has begun the same collectives as the others and does not wait for them")
    least = min((_progress(state) for state in states), default=None)
    late = _ranks(state for state in states if _progress(state) == least)
    if 0 < len(late) < len(states):
        return Verdict(late, "which has come less far than the others")
    return Verdict((), "all ranks are at the same place: the network between them may be broken")


def waits_for(states: Sequence[RankState]) -> Mapping[int, tuple[int, ...]]:
    """Return rank → the ranks that have not begun its last collective, for those ranks that have such."""
    by_rank = {state.rank: state for state in states}
    found = {}
    for state in states:
        call = state.call
        if call is None or call.key == 0:
            continue
        others = [by_rank[rank] for rank in call.ranks if rank in by_rank and rank != state.rank]
        if late := _ranks(other for other in others if other.counts.get(call.key, 0) < call.number):
            found[state.rank] = late
    return found


def _ranks(states: object) -> tuple[int, ...]:
    return tuple(sorted(state.rank for state in states))  # type: ignore[attr-defined]


def _sleeps(state: RankState) -> bool:
    return state.process == kernel.STATES["D"]


def _is_silent(state: RankState) -> bool:
    return state.silence > SILENT_SECONDS


def _progress(state: RankState) -> tuple[int, int]:
    return state.step, state.micro


def taking_part(states: Sequence[RankState]) -> list[RankState]:
    """Return the states of the ranks that are watched still."""
    return [state for state in states if state.part == TAKES_PART]
