"""The report of a hang: who is behind, what the others wait for, and where each rank is."""

from __future__ import annotations

import linecache
import sysconfig
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path

from llmtrain.distributed.agreement import format_ranks
from llmtrain.errors import Problem
from llmtrain.watch.judge import Verdict, waits_for
from llmtrain.watch.layout import Call, RankState

_ROOTS = (str(Path(__file__).parents[2]) + "/", sysconfig.get_paths()["purelib"] + "/")


def headline(
    states: Sequence[RankState], verdict: Verdict, seconds: float, hosts: Mapping[int, str]
) -> Problem:
    """Return the line with which the job ends.

    seconds: since the last progress of any rank. hosts: rank → name of its host, of all ranks of the run.
    """
    if not verdict.behind:
        step = max((state.step for state in states), default=0)
        return Problem(f"step {step}", f"no progress of any rank for {seconds:.0f} s; {verdict.why}")
    names = ", ".join(dict.fromkeys(hosts[rank] for rank in verdict.behind))
    first = next((state for state in states if state.rank == verdict.behind[0]), None)
    where = "" if first is None else f" in {place_of(first)}"
    got = f"no progress for {seconds:.0f} s{where}"
    if len(hosts) > 1:
        got += f": {'it is the rank' if len(verdict.behind) == 1 else 'they are the ranks'} {verdict.why}"
    waiting = [(s, s.call) for s in states if s.call is not None and s.call.waits]
    others = [(state, call) for state, call in waiting if state.rank not in verdict.behind]
    if others:
        state, call = others[0]
        same = [other.rank for other, its in others if _name(its) == _name(call)]
        said = "waits" if len(same) == 1 else "wait"
        got += f"; {format_ranks(same)} {said} in {_name(call)}, in {place_of(state)}"
    return Problem(f"{format_ranks(verdict.behind)} on {names}", got)


def report(states: Sequence[RankState], verdict: Verdict, seconds: float, hosts: Mapping[int, str]) -> str:
    """Return the report: each group of ranks that are at the same place, with a stack, those behind first."""
    lines = [f"no rank made progress for {seconds:.0f} s"]
    missing = sorted(set(hosts) - {state.rank for state in states})
    if missing:
        lines.append(f"Nothing is known of {format_ranks(missing)}.")
    waits = waits_for(states)
    for group in _alike(states, verdict):
        first, ranks = group[0], sorted(state.rank for state in group)
        on = ", ".join(dict.fromkeys(state.host for state in group))
        lines += ["", f"{format_ranks(ranks)} on {on}: {place_of(first)} for {first.phase_age:.0f} s"]
        pids = ", ".join(str(state.pid) for state in group)
        lines.append(f"  {'process' if len(group) == 1 else 'processes'} {pids}: {_process(first)}")
        lines += [f"  {line}" for line in _details(first, waits.get(first.rank, ()))]
        lines += [f"    {line}" for line in stack_lines(first.stack)]
    return "\n".join(lines) + "\n"


def place_of(state: RankState) -> str:
    """Return where a rank is in the run."""
    if state.phase == "start" or not state.step:
        return "its start" if state.phase in ("start", "step") else f"the {state.phase} before the first step"
    micro = f" of micro-batch {state.micro}" if state.phase in ("forward", "backward") else ""
    if state.phase == "end":
        return f"the end, after step {state.step:,}"
    where = "" if state.phase == "step" else f"{state.phase}{micro} of "
    return f"{where}step {state.step:,}"


def stack_lines(stack: Sequence[tuple[str, int, str]]) -> Iterator[str]:
    """Yield a line for each frame, with its source where this host has the file."""
    for file, line, function in stack:
        if file.startswith("<frozen"):
            continue
        source = linecache.getline(file, line).strip()
        yield f"{short(file)}:{line} in {function}" + (f": {source}" if source else "")


def short(file: str) -> str:
    """Return the path of a file without that of the project or of installed packages."""
    for root in _ROOTS:
        file = file.removeprefix(root)
    return file


def _name(call: Call) -> str:
    size = f", {_bytes(call.size)}" if call.size else ""
    between = "between" if call.kind in ("send", "recv") else "of"
    return f"{call.kind} number {call.number:,} {between} {format_ranks(call.ranks)}{size}"


def _bytes(size: int) -> str:
    return f"{size:,} bytes" if size < 1 << 20 else f"{size / (1 << 20):,.1f} MiB"


def _process(state: RankState) -> str:
    return state.process + (f", in {state.wait} of the kernel" if state.wait else "")


def _details(state: RankState, late: Sequence[int]) -> Iterator[str]:
    if state.silence > 2:
        yield f"no sign of life for {state.silence:.0f} s"
    call = state.call
    if call is not None:
        for_whom = f"; {format_ranks(late)} has not begun it" if late else ""
        if call.waits:
            yield f"waits in {_name(call)} for {call.age:.0f} s{for_whom}"
        else:
            yield f"last collective: {_name(call)}, {call.age:.0f} s ago{for_whom}"
    if state.stack:
        older = f", taken {state.stack_age:.0f} s ago" if state.stack_age > 2 else ""
        yield f"Python stack{older}:"


def _alike(states: Sequence[RankState], verdict: Verdict) -> list[list[RankState]]:
    """Return the states, those together whose ranks are at the same place; ranks that are behind first."""
    groups: dict[object, list[RankState]] = {}
    ordered = sorted(states, key=lambda state: (state.rank not in verdict.behind, state.rank))
    for state in ordered:
        call = None if state.call is None else (_name(state.call), state.call.waits)
        what = (state.phase, state.step, state.micro, state.process, call, tuple(state.stack))
        groups.setdefault((state.rank in verdict.behind, what), []).append(state)
    return list(groups.values())
