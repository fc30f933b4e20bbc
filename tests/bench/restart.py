"""Seconds from the death of a rank to the next step of its job, part by part.

    python -m tests.bench.restart CORPUS [--ranks 2] [model=gpt_tiny …]

A real job of `MAX_RESTARTS=1` is started by the launcher, a rank is killed once a checkpoint is written, and
the events of the run tell when what followed.
"""

from __future__ import annotations

import argparse
import json
import os
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import psutil

from llmtrain.track.events import Event, read_events
from tests.support.training import TINY_GPT

SETTINGS = ("train.steps=100000", "checkpoint.every=10", "evaluation.at_start=false", "evaluation.every=null")
PATIENCE_SECONDS = 600


def wait_for(find: Callable[[], Any]) -> Any:
    deadline = time.monotonic() + PATIENCE_SECONDS
    while not (found := find()):
        assert time.monotonic() < deadline, "the job does not go on"
        time.sleep(0.02)
    return found


def events(run: Path, kind: str) -> list[Event]:
    return [event for event in read_events(run / "events.jsonl") if event.kind == kind]


def last_step(run: Path) -> int:
    with (run / "metrics.jsonl").open("rb") as file:
        lines = file.read().splitlines()
    return max((json.loads(line)["step"] for line in lines if line.endswith(b"}")), default=0)


def measure(corpus: str, ranks: int, overrides: list[str]) -> dict[str, float]:
    """Return part → seconds, in the order of time."""
    with tempfile.TemporaryDirectory() as folder:
        run = Path(folder) / "run"
        words = [*SETTINGS, f"data.path={corpus}", f"run.dir={run}", *(overrides or TINY_GPT)]
        environment = {**os.environ, "NPROC_PER_NODE": str(ranks), "MAX_RESTARTS": "1"}
        command = [sys.executable, "-m", "llmtrain.distributed.torchrun", *words]
        launcher = subprocess.Popen(
            command, env=environment, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL
        )
        try:
            wait_for(lambda: events(run, "save"))
            children = psutil.Process(launcher.pid).children()
            victim = next(child for child in children if child.environ().get("RANK") == str(ranks - 1))
            killed = time.time()
            victim.send_signal(signal.SIGKILL)
            [restart] = wait_for(lambda: events(run, "restart"))
            start = wait_for(lambda: events(run, "start")[1:])[0]
            wait_for(lambda: last_step(run) > (start.step or 0))
            stepped = time.time()
        finally:
            launcher.terminate()
            launcher.wait()
    return {
        "the other ranks end, and the launcher decides": restart.at - killed,
        "ranks start, meet, open data and checkpoint": start.at - restart.at,
        "the first step": stepped - start.at,
        "together": stepped - killed,
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("corpus")
    parser.add_argument("--ranks", type=int, default=2)
    parser.add_argument("overrides", nargs="*", help="of llmtrain train; without any, a tiny GPT")
    given = parser.parse_args()
    for part, seconds in measure(given.corpus, given.ranks, given.overrides).items():
        print(f"{part:<50} {seconds:6.1f} s", flush=True)


if __name__ == "__main__":
    main()
