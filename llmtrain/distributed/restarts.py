"""Decide, once the ranks of an attempt have ended, whether the job ends or its ranks are started anew."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from llmtrain.errors import EXIT_CODE, INTERRUPTED_EXIT_CODE, WATCH_EXIT_CODE

ATTEMPT = "LLMTRAIN_ATTEMPT"
"""Variable by which a launcher tells its ranks the number of the attempt, from 1."""
ELASTIC = "LLMTRAIN_ELASTIC"
"""Variable by which a launcher tells its ranks that the job may have fewer processes than the layout asks."""
FAILURES_WITHOUT_STEP = 3
"""Failures in a row without a checkpoint of a new step after which a job ends: it would fail forever."""

# Exit codes that a rank can also have because another rank failed: it was terminated, it stopped on request,
# a connection broke (an exception), or its communication library aborted. Any other code has its own cause.
SIGTERM_CODE, _EXCEPTION, _SIGABRT = 128 + 15, 1, 128 + 6
_LEAST_SPECIFIC_FIRST = (SIGTERM_CODE, INTERRUPTED_EXIT_CODE, _EXCEPTION, _SIGABRT)


def root_cause(exit_codes: Sequence[int]) -> int:
    """Return the index of the nonzero exit code that best identifies why a job failed; the first in a tie.

    After one rank fails the others follow in any order, and hosts have different clocks, so the codes are
    better evidence than the times. Negative codes are signals, as in subprocess.
    """

    def specificity(index: int) -> int:
        code = shell_code(exit_codes[index])
        known = _LEAST_SPECIFIC_FIRST
        if code == WATCH_EXIT_CODE:  # such a rank kills those that cannot end themselves
            return len(known) + 1
        return known.index(code) if code in known else len(known)

    return max((i for i, code in enumerate(exit_codes) if code), key=specificity)


def shell_code(exit_code: int) -> int:
    """Return the exit code as a shell reports it: 128 + n for a process ended by signal n."""
    return 128 - exit_code if exit_code < 0 else exit_code


@dataclass(frozen=True)
class Ending:
    """How the ranks of one host ended."""

    code: int
    """0, or the exit code of the rank that failed, as a shell reports it."""
    what: str = ""
    """What failed, in words."""
    asked: bool = False
    """Whether the launcher was asked to stop."""
    followed: bool = False
    """Whether the launcher ended the ranks because those of another host had failed."""


@dataclass(frozen=True)
class Verdict:
    """What becomes of the job."""

    restart: bool
    code: int
    """The exit code of the job, if it ends."""
    why: str = ""
    """What failed, and why there is no restart, if none of a failed job is made."""


class Restarts:
    """The restarts of a job so far, on the host that decides."""

    def __init__(self, most: int, run_folder: Path, memory: Path | None = None) -> None:
        """most: number of restarts after which the job ends. memory: folder of this host for copies of the
        state in memory; None: there are none."""
        self.most = most
        self.made = 0
        self._run_folder, self._memory = run_folder, memory
        self._last_step = self._newest_step()
        self._failures_without_step = 0

    def decide(self, endings: Mapping[str, Ending | None]) -> Verdict:
        """Return what becomes of the job. endings: name of each host → how its ranks ended; None: the host
        is gone."""
        lost = [name for name, ending in endings.items() if ending is None]
        ended = [ending for ending in endings.values() if ending is not None]
        own = [ending for ending in ended if ending.code and not ending.followed] or ended
        codes = [ending.code for ending in own]
        code, what = 0, ""
        if any(codes):
            cause = own[root_cause(codes)]
            code, what = cause.code, cause.what
        if lost:
            code, what = code or 1, f"host {', '.join(lost)} gave no sign of life"
        if code == 0:
            return Verdict(False, 0)
        if any(ending.asked for ending in ended) or code == INTERRUPTED_EXIT_CODE:
            return Verdict(False, code)  # a failure stays one, such as a save that failed
        if code == EXIT_CODE:  # a mistake of the user stays one
            return Verdict(False, code)
        step = self._newest_step()
        self._failures_without_step = 1 if step > self._last_step else self._failures_without_step + 1
        self._last_step = step
        if self._failures_without_step >= FAILURES_WITHOUT_STEP:
            return Verdict(False, code, f"{what}; {self._failures_without_step} failures without a new step")
        if self.made >= self.most:
            return Verdict(False, code, f"{what}; all {self.most} restarts are used up")
        self.made += 1
        return Verdict(True, code, what)

    @property
    def step(self) -> int:
        """Return the step of the newest checkpoint, from which the job goes on where memory has none."""
        return newest_step(self._run_folder)

    def _newest_step(self) -> int:
        """Return the newest step that was saved, in the run folder or in memory."""
        in_memory = 0 if self._memory is None else _newest_in(self._memory)
        return max(newest_step(self._run_folder), in_memory)


def newest_step(run_folder: Path) -> int:
    """Return the step of the newest complete checkpoint in a run folder; 0 if there is none."""
    return _newest_in(run_folder / "checkpoints")


def _newest_in(folder: Path) -> int:
    names = (manifest.parent.name for manifest in folder.glob("step-*/manifest.json"))
    numbers = (name.removeprefix("step-") for name in names)
    return max((int(number) for number in numbers if number.isdecimal()), default=0)
