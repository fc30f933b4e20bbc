"""The watching thread of a rank: it notes the rank's stack, looks at the ranks of its host, and ends the job
when none of the run makes progress.

The lowest rank of a host that gives signs of life speaks for the host. On one host it also judges; of several
hosts, the first one's speaker does (see board.py).
"""

from __future__ import annotations

import json
import os
import threading
import time
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from llmtrain import files
from llmtrain.errors import WATCH_EXIT_CODE, Problem
from llmtrain.watch import ending, judge, kernel, layout
from llmtrain.watch.board import Board
from llmtrain.watch.comparing import Comparing
from llmtrain.watch.config import WatchConfig
from llmtrain.watch.judge import Verdict
from llmtrain.watch.layout import RankState
from llmtrain.watch.neighbours import Brief, Folder
from llmtrain.watch.recorder import Recorder
from llmtrain.watch.report import headline, report

PERIOD_SECONDS = 0.5
EARLY = 0.9
"""Part of the limit after which ranks are examined, so that the report is out within it."""
SUSPENDED_SECONDS = 5.0
"""A thread that was not run for so long was stopped itself, with the machine or by a signal."""
ANSWER_SECONDS = 4.0
"""Seconds that hosts have to say what their ranks do."""
HOST_SILENT_SECONDS = 10.0
LINGER_SECONDS = 10.0
"""Seconds for which a rank that failed still compares collectives."""


@dataclass(frozen=True)
class Places:
    """What the watch writes, and where its hosts and ranks are."""

    run: Path
    """The run folder, which gets the event."""
    logs: Path
    """The folder of the report."""
    hosts: Sequence[tuple[str, tuple[int, ...]]]
    """Name and ranks of each host."""

    @property
    def host_of(self) -> dict[int, str]:
        """Return rank → name of its host."""
        return {rank: name for name, ranks in self.hosts for rank in ranks}


class Watcher:
    """Watches in a thread, from `start` to `stop`."""

    def __init__(
        self,
        config: WatchConfig,
        places: Places,
        recorder: Recorder,
        folder: Folder,
        board: Board | None,
        comparing: Comparing | None,
    ) -> None:
        """board: None on one host. comparing: None if collectives are not compared."""
        self._config, self._places, self._comparing = config, places, comparing
        self._recorder, self._folder, self._board = recorder, folder, board
        self._part = layout.TAKES_PART
        self._stopped = threading.Event()
        self._progress = _Progress()
        self._answered = 0
        self._thread = threading.Thread(target=self._run, name="watch", daemon=True)

    def start(self) -> None:
        self._thread.start()

    def stop(self, failed: bool) -> None:
        """Take no part any more. After a failure the thread goes on for a while, to tell what the failure
        came from."""
        self._part = layout.FAILED if failed else layout.GONE
        self._recorder.beat(self._part)
        if failed and len(self._places.host_of) > 1:
            timer = threading.Timer(LINGER_SECONDS, self._stopped.set)
            timer.daemon = True
            timer.start()
            return
        self._stopped.set()
        self._thread.join()

    def _run(self) -> None:
        last = time.monotonic()
        while not self._stopped.wait(PERIOD_SECONDS):
            now = time.monotonic()
            if now - last > SUSPENDED_SECONDS:
                self._progress.suspend(now - last)
            last = now
            with suppress(OSError):  # the folder may go at any time, as when memory is full
                self._tick(now)
        if self._part == layout.FAILED:
            self._recorder.close()
            self._folder.close()

    def _tick(self, now: float) -> None:
        self._recorder.beat(self._part)
        self._recorder.write_text(now)
        if self._folder.end.exists():
            ending.write_flight_recorder(self._places.logs, self._folder.own)
            os._exit(WATCH_EXIT_CODE)
        briefs = self._folder.briefs(now)
        self._progress.note(briefs, now, self._phase_counts)
        alive = [rank for rank, brief in briefs.items() if _is_alive(brief)]
        if min(alive, default=-1) != self._folder.own:
            return
        if self._comparing is not None and (problem := self._comparing.on_this_host()) is not None:
            self._end_divergence(problem)
        if self._board is not None:
            self._talk(self._board, now)
        elif self._part == layout.TAKES_PART and self._is_too_long(
            self._progress.idle(now), self._patience()
        ):
            self._end_hang(self._folder.examined(), self._progress.idle(now))

    @property
    def _phase_counts(self) -> bool:
        return self._recorder.is_warm and self._recorder.phase not in (
            "start",
            "data",
            "evaluation",
            "save",
            "end",
        )

    def _patience(self) -> float:
        """Return how long the ranks of this host may stay without progress."""
        if self._config.hang_seconds == 0:
            return float("inf")
        if self._progress.idle(time.monotonic()) < self._config.hang_seconds / 2:
            return self._config.hang_seconds  # which is not reached: ranks need not be looked at
        states = judge.taking_part(self._folder.states(time.monotonic()))
        for state in states:
            state.process = kernel.state_of(state.pid, state.started)
        return max(judge.limit_of(self._config, states), judge.LONGER * self._progress.longest)

    def _is_too_long(self, idle: float, patience: float) -> bool:
        return idle > EARLY * patience

    # Several hosts

    def _talk(self, board: Board, now: float) -> None:
        idle, patience = self._progress.idle(now), self._patience()
        said: dict[str, Any] = {"idle": idle, "patience": _finite(patience), "odd": self._odd(now)}
        if self._comparing is not None:
            said |= self._comparing.said(board.topic.get("calls", {}))
        board.exchange(said)
        if board.end is not None:
            self._leave(board.end)
        if board.question > self._answered:
            self._answer(board)
        if board.is_judge:
            self._judge_hosts(board, now)
        silence = now - board.answered_at
        is_cut_off = self._is_too_long(min(silence, idle), max(patience, HOST_SILENT_SECONDS))
        if self._part == layout.TAKES_PART and is_cut_off:
            why = f"the store that rank 0 or its launcher serves has not answered for {silence:.0f} s"
            states = self._folder.examined()
            verdict = judge.who_is_behind(judge.taking_part(states))
            if verdict.why == judge.WAITED_FOR or len(verdict.behind) in (0, len(states)):
                verdict = Verdict((), why)
            self._end_hang(states, idle, verdict, f"{why}; ")

    def _odd(self, now: float) -> list[str]:
        """Return a sentence about each rank of this host that cannot go on."""
        states = judge.taking_part(self._folder.states(now)) if self._progress.idle(now) > 1 else []
        for state in states:
            state.process = kernel.state_of(state.pid, state.started)
        odd = [state for state in states if state.process in (kernel.STOPPED, kernel.ENDED)]
        return [f"{state.name}, whose process is {state.process}" for state in odd]

    def _answer(self, board: Board) -> None:
        self._answered = board.question
        content: dict[str, Any] = {"states": [state.encode() for state in self._folder.examined()]}
        if self._comparing is not None:
            content["rings"] = self._comparing.rings()
        board.answer(board.question, content)

    def _judge_hosts(self, board: Board, now: float) -> None:
        hosts = board.hosts()
        own = (self._progress.idle(now), self._patience())
        spoken = [own] + [
            (said["idle"] + age, said["patience"] or float("inf"))
            for host, (said, age) in hosts.items()
            if host != board.host and age < HOST_SILENT_SECONDS
        ]
        idle = min(seconds for seconds, _ in spoken)
        patience = max(seconds for _, seconds in spoken)
        if any(said["odd"] or age > HOST_SILENT_SECONDS for said, age in hosts.values()):
            patience = self._config.hang_seconds or patience  # the others wait in vain
        if self._comparing is not None:
            self._compare_hosts(self._comparing, board, [said for said, _ in hosts.values()])
        if self._part == layout.TAKES_PART and self._is_too_long(idle, patience):
            answers = self._ask_all(board)
            states = [RankState.decode(state) for answer in answers.values() for state in answer["states"]]
            silent = [host for host in range(board.num_hosts) if host not in answers]
            verdict = None
            if silent:
                ranks = tuple(sorted(rank for host in silent for rank in self._places.hosts[host][1]))
                names = ", ".join(dict.fromkeys(self._places.hosts[host][0] for host in silent))
                verdict = Verdict(ranks, f"whose host ({names}) gives no sign of life")
            self._end_hang(sorted(states, key=lambda state: state.rank), idle, verdict)

    def _ask_all(self, board: Board) -> dict[int, dict[str, Any]]:
        """Ask all hosts what their ranks do; return host → answer, of those that answer in time."""
        question = board.question + 1
        board.ask(question, board.topic)
        self._answer(board)
        deadline = time.monotonic() + ANSWER_SECONDS
        while True:
            answers = board.answers(question)
            if len(answers) == board.num_hosts or time.monotonic() > deadline:
                return answers
            time.sleep(PERIOD_SECONDS / 2)

    def _compare_hosts(self, comparing: Comparing, board: Board, said: Sequence[dict[str, Any]]) -> None:
        asked = board.topic.get("calls", {})
        if any(of_host.get("asked") != asked for of_host in said):
            return  # some have not read yet what was asked last
        board.topic = {"calls": comparing.next_numbers(said)}
        if comparing.differ(said) and (problem := comparing.of_rings(self._ask_all(board).values())):
            self._end_divergence(problem)

    # The end

    def _end_hang(
        self, states: list[RankState], idle: float, verdict: Verdict | None = None, note: str = ""
    ) -> None:
        taking = judge.taking_part(states)
        verdict = verdict or judge.who_is_behind(taking)
        problem = headline(taking, verdict, idle, self._places.host_of)
        text = note + report(taking, verdict, idle, self._places.host_of)
        self._end("hang", problem, text, max((state.step for state in taking), default=0))

    def _end_divergence(self, problem: Problem) -> None:
        states = self._folder.examined()
        self._end("divergence", problem, "collectives of ranks differ", max(s.step for s in states))

    def _end(self, kind: str, problem: Problem, text: str, step: int) -> None:
        end = {"kind": kind, "line": str(problem), "by": self._folder.own}
        decided = end
        if self._board is not None:
            decided = self._board.decide(end)
            time.sleep(3 * PERIOD_SECONDS)  # the store may end with this process: let other hosts read it
        if decided == end:
            path = ending.write_report(self._places.logs, f"llmtrain: error: {problem}\n\n{text}")
            ending.tell(self._places.run, kind, problem, text, path, step)
        self._leave(decided)

    def _leave(self, end: dict[str, Any]) -> None:
        states = self._folder.states(time.monotonic())
        files.write_atomically(self._folder.end, json.dumps(end))
        ending.write_flight_recorder(self._places.logs, self._folder.own)
        ending.leave(states, self._folder.path)

    def suspect(self) -> str | None:
        """Return a sentence about the rank that is behind, as far as this rank can see now; None if it cannot
        tell."""
        # Ranks that failed wait no more, but tell for whom they waited.
        states = [state for state in self._folder.examined() if state.part != layout.GONE]
        verdict = judge.who_is_behind(states)
        if verdict.behind and len(states) > 1:
            named = next(state for state in states if state.rank in verdict.behind)
            return f"{named.name}, {verdict.why}"
        hosts = {} if self._board is None else self._board.another().hosts()
        return next((odd for said, _ in hosts.values() for odd in said["odd"]), None)


class _Progress:
    """When the ranks of this host last made progress."""

    def __init__(self) -> None:
        self._ticks: dict[int, int] = {}
        self._at = time.monotonic()
        self.longest = 0.0
        """Longest pause within steps so far."""

    def note(self, briefs: dict[int, Brief], now: float, counts: bool) -> None:
        """counts: whether a pause that ends here is one of a step."""
        ticks = {rank: brief.ticks for rank, brief in briefs.items() if brief.part == layout.TAKES_PART}
        if ticks != self._ticks:
            if counts and now - self._at > 2 * PERIOD_SECONDS:
                self.longest = max(self.longest, now - self._at)
            self._ticks, self._at = ticks, now

    def suspend(self, seconds: float) -> None:
        """Leave out seconds in which this thread did not run."""
        self._at += seconds

    def idle(self, now: float) -> float:
        return now - self._at


def _is_alive(brief: Brief) -> bool:
    return brief.part != layout.GONE and brief.silence < judge.SILENT_SECONDS


def _finite(seconds: float) -> float:
    """Return 0 for infinity, which JSON lacks."""
    return 0.0 if seconds == float("inf") else seconds
