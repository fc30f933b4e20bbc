"""A storm of faults over training jobs of two hosts, in all kinds of layout.

    python -m tests.faults.chaos [faults=200] [seed=0] [jobs=3] [output=chaos.jsonl] [folder=DIR]
    python -m tests.faults.chaos seed=0 only=7

Each job has `MAX_RESTARTS`, a corpus that is streamed from a web server, its run folder on a small disk, and
meets a dozen faults at random moments (tests/support/storm/faults.py), besides samples whose gradients are
NaN. A scheduler, the storm itself, starts launchers again that have ended. After each fault the job must take
further steps, and where it restarted or ended, a line must name the cause; at its end its curve must be bit
for bit that of an undisturbed run of the same training. Anything else is a failure, and makes the exit code
1. The seed and the number of a job decide all but the clock: `only=` runs a job again.

jobs: how many run at the same time. output: gets a line for each fault; what it holds of finished jobs is not
run again. folder: gets what a failed job leaves; default: a new one.
"""

from __future__ import annotations

import json
import os
import random
import shutil
import signal
import statistics
import sys
import tempfile
import threading
import time
import traceback
from collections import Counter
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, suppress
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, NoReturn

from llmtrain.track.events import EVENTS, read_events
from tests.support.storm import layouts
from tests.support.storm.faults import KINDS, NAN, Fault, is_named, plan
from tests.support.storm.job import TRACEBACK, Job, started
from tests.support.storm.layouts import LAYOUTS, SIZE, Layout

FAULTS = 12
"""Of a job, besides NaN."""
PATIENCE_SECONDS = 150.0
"""For a step after a fault."""
CALM_STEPS = 6
"""After which a fault without a restart is over: files that failed may be needed only some steps later."""
NO_RESTART, BY_ITSELF = "went on without a restart", "restarted by itself"
BY_SCHEDULER, WITH_LINE = "started again by the scheduler", "ended with a line, started again"
FAILED = "failed"
OUTCOMES = (NO_RESTART, BY_ITSELF, BY_SCHEDULER, WITH_LINE, FAILED)


@dataclass(frozen=True)
class Outcome:
    """What became of one fault."""

    job: int
    number: int
    layout: str
    fault: str
    step: int
    """The last one before the fault."""
    outcome: str
    seconds: float | None
    """From the fault to the next step."""
    line: str = ""
    """It names the cause, where the job restarted or ended."""
    problem: str = ""
    """Why it failed."""
    details: str = ""
    """The fault in full."""


def weather(job: Job, fault: Fault) -> dict[str, Any]:
    """Do one fault to a job that runs; → the part of an Outcome that follows."""
    said, starts, scheduled = job.said(), len(job.starts), job.scheduler_starts
    began, step = time.monotonic(), job.step
    fault.strike(job)
    if fault.longest:
        job.rest(fault.seconds)
        fault.lift(job)
    lifted = job.step

    def has_gone_on(calm: int) -> bool:
        found = job.starts
        if len(found) > starts:
            return job.step > found[-1]
        return fault.restarts is not True and job.step >= lifted + calm

    went_on = job.wait(lambda: has_gone_on(1), PATIENCE_SECONDS)
    seconds = time.monotonic() - began
    went_on = went_on and job.wait(lambda: has_gone_on(CALM_STEPS), PATIENCE_SECONDS)
    text, restarted = job.said_since(said), len(job.starts) > starts
    line, problem = is_named(fault, text), ""
    if not went_on:
        problem = f"no step in {PATIENCE_SECONDS:.0f} s"
    elif TRACEBACK in text:
        problem = "a traceback"
    elif restarted and fault.restarts is False:
        problem = "it restarted"
    elif restarted and not line:
        problem = "no line names the cause"
    if problem:
        outcome = FAILED
    elif not restarted:
        outcome = NO_RESTART
    elif job.scheduler_starts == scheduled:
        outcome = BY_ITSELF
    else:
        outcome = BY_SCHEDULER if fault.takes_launcher else WITH_LINE
    found = {"step": step, "outcome": outcome, "seconds": round(seconds, 2), "problem": problem}
    return {**found, "line": line if restarted else "", "details": repr(fault)}


class Storm:
    """Runs jobs and keeps what becomes of them."""

    def __init__(self, seed: int, output: Path, folder: Path) -> None:
        self.seed, self._output, self._folder = seed, output, folder
        self._lock = threading.Lock()
        self._running: list[ExitStack] = []
        self._curve_locks = {layout.name: threading.Lock() for layout in LAYOUTS}
        self._curves: dict[tuple[str, int], dict[int, tuple[Any, ...]]] = {}
        self.corpus = layouts.make_corpus(folder / "served" / "corpus")

    def run_prepared(self, number: int) -> list[Outcome]:
        """Run the job that the seed and a number decide; a failure of the storm itself is one of the job."""
        layout, faults, is_numbered = prepared(self.seed, number, FAULTS)
        try:
            return self.run(number, layout, faults, is_numbered=is_numbered)
        except Exception:
            problem = traceback.format_exc()
            told = {"job": number, "layout": layout.name, "starts": 0, "problem": problem, "folder": None}
            self._write({**told, "seed": self.seed, "curve": "not compared"})
            return []

    def run(
        self, number: int, layout: Layout, faults: Sequence[Fault], *, is_numbered: bool
    ) -> list[Outcome]:
        """Run one job to its end; → what became of each fault, the NaN included."""
        folder = self._folder / f"job{number}"
        shutil.rmtree(folder, ignore_errors=True)
        outcomes: list[Outcome] = []
        samples = layout.nan_samples(self.seed)
        tag = f"j{number % 1000}"
        with ExitStack() as stack:
            self._running.append(stack)
            job = stack.enter_context(
                started(folder, tag, layout, self.corpus, samples, is_numbered=is_numbered)
            )
            problem = "" if job.wait(lambda: job.step > 2, PATIENCE_SECONDS) else "it does not start"
            for i, fault in enumerate(faults):
                if problem or not self._is_time(job, fault, layout):
                    break
                told = weather(job, fault)
                outcomes.append(Outcome(number, i, layout.name, fault.kind, **told))
                self._write(asdict(outcomes[-1]))
                problem = told["problem"] if told["problem"].startswith("no step") else problem
            job.set_pause(0.0)
            if not problem and not job.wait(lambda: job.is_done, PATIENCE_SECONDS):
                problem = "it does not end"
            if not problem:
                problem = self._difference(layout, job)
                if not problem and (log := job.traceback()):
                    problem = f"a traceback in {log}"
                outcomes += self._of_nan(number, layout, job, problem, len(faults))
            failed = bool(problem) or any(outcome.problem for outcome in outcomes)
            if failed:
                job.kill()
                with suppress(OSError, shutil.Error):
                    shutil.copytree(job.run, folder / "kept", ignore_dangling_symlinks=True)
            told = {"job": number, "layout": layout.name, "starts": len(job.starts), "problem": problem}
        curve = "differs" if "curve" in problem else "equal" if not problem else "not compared"
        self._write({**told, "seed": self.seed, "curve": curve, "folder": str(folder) if failed else None})
        if not failed:
            shutil.rmtree(folder, ignore_errors=True)
        return outcomes

    def end(self) -> NoReturn:
        """End all jobs at once, and this process."""
        for stack in self._running:
            stack.close()
        os._exit(1)

    def _is_time(self, job: Job, fault: Fault, layout: Layout) -> bool:
        """Wait for the moment of a fault; → whether the job still has so many steps."""
        due = job.step + fault.gap
        if due + 3 * CALM_STEPS > layout.steps:
            return False
        job.wait(lambda: job.step >= due, PATIENCE_SECONDS)
        job.rest(fault.delay)
        return True

    def _difference(self, layout: Layout, job: Job) -> str:
        """How the curve of a job differs from the undisturbed one; "" if it does not."""
        expected, found = self._undisturbed(layout), layouts.curve(job.run)
        steps = sorted({*expected, *found})
        first = next((step for step in steps if expected.get(step) != found.get(step)), None)
        if first is None:
            return ""
        return f"the curve differs at step {first}: {found.get(first)}, undisturbed {expected.get(first)}"

    def _undisturbed(self, layout: Layout) -> dict[int, tuple[Any, ...]]:
        key = (layout.name, layout.steps)
        with self._curve_locks[layout.name]:
            if key not in self._curves:
                folder = self._folder / f"undisturbed {layout.name}"
                shutil.rmtree(folder, ignore_errors=True)  # of a storm that was stopped
                self._curves[key] = layouts.undisturbed(layout, self.seed, self.corpus, folder)
                shutil.rmtree(folder)
            return self._curves[key]

    def _of_nan(self, number: int, layout: Layout, job: Job, problem: str, first: int) -> list[Outcome]:
        """What became of each NaN: the step was left out, or the run went back."""
        kind = "rollback" if layout.on_spike == "rollback" else "skip"
        events = [event for event in read_events(job.run / EVENTS) if event.kind == kind]
        samples = layout.nan_samples(self.seed)
        if kind == "rollback":
            samples = samples[::2]  # two in a row make the run go back once
        found = []
        for i, sample in enumerate(samples):
            here = [event for event in events if _is_of(event.step or 0, sample, kind)]
            missing = "" if here else f"no {kind} at sample {sample}"
            said = problem or missing
            outcome = FAILED if said else NO_RESTART
            details = f"train.on_spike={layout.on_spike}"
            line = str(here[-1].facts.get("why", "")) if here else ""
            told = (layout.name, NAN, sample // SIZE, outcome, None, line, said, details)
            found.append(Outcome(number, first + i, *told))
            self._write(asdict(found[-1]))
        return found

    def _write(self, record: dict[str, Any]) -> None:
        with self._lock, self._output.open("a") as file:
            file.write(json.dumps(record) + "\n")
        said = [str(record[key]) for key in ("job", "layout", "fault", "outcome", "seconds") if key in record]
        said += [f"{key}: {record[key]}" for key in ("curve", "problem", "line") if record.get(key)]
        print(" | ".join(said)[-400:], flush=True)


def _is_of(step: int, sample: int, kind: str) -> bool:
    """Whether an event of a step is of this sample. A step that was left out has its own number; one that the
    run went back to lies before it, and the further the more samples were left out before."""
    own = sample // SIZE + 1
    return step == own if kind == "skip" else own - 40 < step <= own


def prepared(seed: int, number: int, count: int) -> tuple[Layout, list[Fault], bool]:
    """The layout of a job, its faults, and whether its hosts have a NODE_RANK."""
    source = random.Random(f"{seed}/{number}")
    layout = LAYOUTS[number % len(LAYOUTS)]
    is_numbered = source.random() < 0.5
    return layout, plan(source, layout, count), is_numbered


def known(output: Path, seed: int) -> tuple[list[dict[str, Any]], set[int], list[dict[str, Any]]]:
    """What a file says of finished jobs: the outcomes of faults, the numbers of the jobs, their ends."""
    records = [json.loads(line) for line in output.read_text().splitlines()] if output.exists() else []
    ends = {record["job"]: record for record in records if "curve" in record and record["seed"] == seed}
    outcomes = {(r["job"], r["number"]): r for r in records if "fault" in r and r["job"] in ends}
    return list(outcomes.values()), set(ends), list(ends.values())


def table(outcomes: Sequence[dict[str, Any]], ends: Sequence[dict[str, Any]]) -> str:
    """A table in Markdown: fault, times, what happened, median seconds to the next step."""
    lines = [f"| fault | times | {' | '.join(OUTCOMES)} | median seconds to the next step |"]
    lines.append("|---" + "|---:" * (len(OUTCOMES) + 2) + "|")
    for kind in [*(kind.kind for kind in KINDS), NAN, "all"]:
        here = [o for o in outcomes if kind in (o["fault"], "all")]
        counts = Counter(o["outcome"] for o in here)
        seconds = [o["seconds"] for o in here if o["seconds"] is not None and o["outcome"] != FAILED]
        median = f"{statistics.median(seconds):.1f}" if seconds and kind != "all" else ""
        cells = " | ".join(str(counts[outcome] or "") for outcome in OUTCOMES)
        lines.append(f"| {kind} | {len(here)} | {cells} | {median} |")
    equal = sum(end["curve"] == "equal" for end in ends)
    lines.append(f"\n{len(ends)} jobs, {equal} curves equal to the undisturbed ones bit for bit.")
    return "\n".join(lines)


def main(words: Sequence[str]) -> int:
    options = dict(word.split("=", 1) for word in words)
    unknown = set(options) - {"faults", "seed", "jobs", "output", "folder", "only"}
    if unknown:
        sys.exit(f"got {', '.join(sorted(unknown))}; allowed: faults, seed, jobs, output, folder, only")
    seed, faults = int(options.get("seed", 0)), int(options.get("faults", 200))
    folder = Path(options.get("folder") or tempfile.mkdtemp(prefix="chaos-")).absolute()
    output = Path(options.get("output") or "chaos.jsonl")
    folder.mkdir(parents=True, exist_ok=True)
    shutil.rmtree(folder / "served", ignore_errors=True)
    if "only" in options:
        output = folder / "only.jsonl"
        output.unlink(missing_ok=True)
    storm = Storm(seed, output, folder)
    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, lambda *_: storm.end())
    outcomes, done, _ = known(output, seed)
    lock, count, planned = threading.Lock(), len(outcomes), 0

    def next_job() -> int | None:
        nonlocal planned
        with lock:
            if count + planned >= faults:
                return None
            planned += FAULTS + len(layouts.NAN_PARTS)
            number = next(number for number in range(len(done) + 1) if number not in done)
            done.add(number)
            return number

    def work() -> None:
        nonlocal planned, count
        while (number := next_job()) is not None:
            found = storm.run_prepared(number)
            with lock:
                planned -= FAULTS + len(layouts.NAN_PARTS)
                count += len(found)

    if "only" in options:
        storm.run_prepared(int(options["only"]))
    else:
        jobs = int(options.get("jobs", 3))
        with ThreadPoolExecutor(jobs) as pool:
            for future in [pool.submit(work) for _ in range(jobs)]:
                future.result()
    records, _, ends = known(output, seed)
    print(table(records, ends))
    failed = [r for r in (*records, *ends) if r["problem"]]
    for record in failed:
        again = f"python -m tests.faults.chaos seed={seed} only={record['job']}"
        print(f"failed: {record['problem']}; again: {again}")
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
