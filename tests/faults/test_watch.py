"""A job in which no rank makes progress ends and names the rank that is behind; collectives that differ are
named before they hang; a slow rank is named."""

from __future__ import annotations

import json
import re
import signal
from pathlib import Path

import pytest

from llmtrain.errors import WATCH_EXIT_CODE
from llmtrain.track.events import EVENTS, read_events
from tests.faults.test_ranks_dying import Launch, launches  # noqa: F401
from tests.faults.test_train_faults import wait_for_step
from tests.support.training import TINY_GPT
from tests.support.warm import PRELUDE, finish, start_ranks

pytestmark = pytest.mark.slow

LIMIT_SECONDS = 4
PATIENCE_SECONDS = 150
SLOW = """
import os, time
from llmtrain.engine.modules import ObjectiveModule

own = ObjectiveModule.forward

def slowed(*arguments, **named):
    time.sleep(0.03)
    return own(*arguments, **named)

if os.environ.get("RANK") == "2":
    ObjectiveModule.forward = slowed
"""
SKIPS = """
import os
from llmtrain.distributed import processes

own, counts = processes.all_sum, 0

def all_sum(values):
    global counts
    is_count = values.shape == (3,) and not values.dtype.is_floating_point
    counts += is_count
    return values if is_count and counts == 20 else own(values)

if os.environ.get("RANK") == "1":
    processes.all_sum = all_sum
"""
"""A rank that leaves out one all-reduce: that of the counts before its 20th step."""
HOSTS_OF = """
import os
from llmtrain.watch import watch

watch._host_key = lambda: f"host {{int(os.environ['RANK']) // {}}}"
"""
"""So many ranks each believe that they are alone on their host, and tell others by the store."""


def command(corpus: Path, run: Path, *overrides: str) -> list[str]:
    settings = ["device=cpu", "data.workers=0", "evaluation.every=null", "evaluation.at_start=false"]
    settings += ["checkpoint.every=null", "train.steps=100000", f"watch.hang_seconds={LIMIT_SECONDS}"]
    return [*TINY_GPT, *settings, f"data.path={corpus}", f"run.dir={run}", *overrides]


def prelude(folder: Path, code: str) -> dict[str, str]:
    file = folder / "prelude.py"
    file.write_text(code)
    return {PRELUDE: str(file)}


def wait_for_event(run: Path, kind: str, launch: Launch) -> dict[str, object]:
    for step in range(20, 2000, 20):
        wait_for_step(step, run, launch.launcher)
        found = [event for event in read_events(run / EVENTS) if event.kind == kind]
        if found:
            return dict(found[0].facts)
    raise AssertionError(f"no {kind} in {run / EVENTS}")


def test_a_slow_rank_and_a_stopped_one_are_named(
    corpus: Path,
    tmp_path: Path,
    launches: list[Launch],  # noqa: F811
):
    run = tmp_path / "run"
    settings = ["batch.global_size=6", "watch.times_every=5", "watch.straggler_steps=10"]
    words = ["llmtrain.distributed.torchrun", *command(corpus, run, *settings)]
    launches.append(Launch(words, run, NPROC_PER_NODE="3", **prelude(tmp_path, SLOW)))
    stopped = launches[0].rank_at(1, 5)
    slow = wait_for_event(run, "straggler", launches[0])
    assert (slow["rank"], slow["is_slow"], slow["phase"]) == (2, True, "forward")
    stopped.send_signal(signal.SIGSTOP)
    code, output = launches[0].finish()

    assert code == WATCH_EXIT_CODE, output
    assert re.search(
        r"warning: rank 2 on \S+ is slow: its work takes \d+\.\d times the median; forward", output
    )
    [told] = [line for line in output.splitlines() if line.startswith("llmtrain: error: ")]
    assert re.match(r"llmtrain: error: rank 1 on \S+: got no progress for [34] s in ", told), told
    assert "it is the rank whose process is stopped by a signal or a debugger" in told
    assert "\nllmtrain: the watch ended this job (76): rank 1 on " in output
    report = (run / "logs/watch.1.txt").read_text()
    assert f"process {stopped.pid}: stopped by a signal" in report
    of_stopped, of_others = (report.partition(f"\n\n{ranks} on ")[2] for ranks in ("rank 1", "ranks 0, 2"))
    for part in (of_stopped, of_others):
        assert "llmtrain/train/loop.py:" in part.partition("\n\n")[0]
    assert "waits in all_reduce number " in of_others
    [event] = [event for event in read_events(run / EVENTS) if event.kind == "hang"]
    assert event.facts["report"] == str(run / "logs/watch.1.txt")
    last = json.loads([line for line in (run / "metrics.jsonl").open() if "seconds/forward" in line][-1])
    assert last["seconds/forward_max"] > 0.03 > last["seconds/forward"]
    assert last["seconds/communication_max"] > 0.01


@pytest.mark.parametrize("hosts", ["", HOSTS_OF.format(1)], ids=["one host", "four hosts"])
def test_a_collective_left_out_is_named_with_its_line(corpus: Path, tmp_path: Path, hosts: str):
    run = tmp_path / "run"
    settings = ["debug.collectives=true", "batch.micro_size=1"]
    started = start_ranks(4, "train", *command(corpus, run, *settings), **prelude(tmp_path, SKIPS + hosts))
    ranks = finish(started, timeout=PATIENCE_SECONDS)
    assert WATCH_EXIT_CODE in [rank.returncode for rank in ranks], ranks
    told = [line for rank in ranks for line in rank.stderr.splitlines() if "as number" in line]
    assert len(told) == 1, ranks
    assert re.search(r"rank 1 on \S+: got all_reduce of .* at \S+\.py:\d+ in step 20", told[0])
    assert re.search(r"called: all_reduce of int64 \(3,\) at \S*engine/counting.py:\d+ in step 20", told[0])
    assert "what ranks 0, 2-3 called" in told[0]


@pytest.mark.parametrize(
    "layout",
    [("parallel.pipeline=2", "parallel.zero=1"), ("parallel.tensor=2", "parallel.zero=3")],
    ids=["pipeline", "tensor and ZeRO 3"],
)
def test_engines_call_the_same_collectives_on_all_ranks(
    corpus: Path, tmp_path: Path, layout: tuple[str, ...]
):
    run = tmp_path / "run"
    settings = ["debug.collectives=true", "train.steps=7", "checkpoint.every=4", "evaluation.every=4"]
    settings += ["watch.times_every=2", "watch.hang_seconds=60", "evaluation.max_samples=8"]
    ranks = finish(start_ranks(4, "train", *command(corpus, run, *settings, *layout)))
    assert [rank.returncode for rank in ranks] == [0] * 4, ranks
    timed = [json.loads(line) for line in (run / "metrics.jsonl").open() if "seconds/forward" in line]
    assert timed
    assert all(
        timed[-1][f"seconds/{phase}"] > 0 for phase in ("forward", "backward", "communication", "optimizer")
    )


def test_hosts_find_the_stopped_rank_together(corpus: Path, tmp_path: Path):
    run = tmp_path / "run"
    words = command(corpus, run, "batch.micro_size=1")
    started = start_ranks(4, "train", *words, **prelude(tmp_path, HOSTS_OF.format(2)))
    try:
        wait_for_step(5, run, started[0])
        started[3].send_signal(signal.SIGSTOP)
    finally:
        ranks = finish(started, timeout=PATIENCE_SECONDS)
    assert [rank.returncode for rank in ranks] == [WATCH_EXIT_CODE] * 3 + [-signal.SIGKILL], ranks
    assert re.search(
        r"error: rank 3 on \S+: got no progress for \d s in .*is stopped by a signal", ranks[0].stderr
    )
    report = (run / "logs/watch.1.txt").read_text()
    assert report.count("llmtrain/train/loop.py:") >= 2


def test_a_rank_is_named_when_the_library_gives_up_first(corpus: Path, tmp_path: Path):
    run, short = tmp_path / "run", "processes.start.__kwdefaults__['timeout_minutes'] = 0.1"
    words = command(corpus, run, "watch.hang_seconds=0")
    environment = prelude(tmp_path, f"from llmtrain.distributed import processes\n{short}\n")
    started = start_ranks(2, "train", *words, "batch.micro_size=4", **environment)
    try:
        wait_for_step(5, run, started[0])
        started[1].send_signal(signal.SIGSTOP)
        _, said = started[0].communicate(timeout=PATIENCE_SECONDS)
    finally:
        for rank in started:
            rank.kill()
            rank.wait()
    assert started[0].returncode == 1, said
    [told] = [line for line in said.splitlines() if line.startswith("llmtrain: error: ")]
    assert re.match(r"llmtrain: error: rank 0: got no answer from another rank \(", told)
    assert re.search(r"; behind is rank 1 on \S+, whose process is stopped by a signal or a debugger$", told)
