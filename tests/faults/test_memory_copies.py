"""A host that is lost costs the steps since the last copy in memory, and no read from disk."""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterator
from pathlib import Path

import pytest

from llmtrain.distributed.memory_folder import _is_held
from tests.faults.test_launch_torchrun import losses
from tests.faults.test_restarts import LONG, Job, events, job, kill_host, stop_in_start, wait_until

pytestmark = pytest.mark.slow


def whole_copies(memory: Path) -> Iterator[int]:
    """The steps of the copies of which the hosts' folders together hold every file."""
    for manifest in memory.glob("*/step-*/manifest.json"):
        try:
            listed = [entry["file"] for entry in json.loads(manifest.read_text())["files"]]
        except FileNotFoundError:  # deleted in this moment
            continue
        step = manifest.parent.name
        if all(list(memory.glob(f"*/{step}/{name}")) for name in listed):
            yield int(step.removeprefix("step-"))


def lose_other_host(disturbed: Job, run: Path, memory: Path) -> list[int]:
    """Kill the host that does not serve, and its memory with it. Return the steps of the whole copies that
    are left, once the first host waits for another in its place; 0 is where the run began."""
    kill_host(disturbed.host_of(1))
    restarts = len(events(run, "restart"))
    wait_until(lambda: len(events(run, "restart")) > restarts)
    for holder in memory.glob("*/.launcher"):
        if not _is_held(holder):
            shutil.rmtree(holder.parent)
    return [0, *sorted(whole_copies(memory))]


@pytest.mark.long("a host counts as gone after ten seconds, twice, and two ranks start four times")
def test_a_lost_host_costs_the_steps_since_the_last_copy(corpus: Path, tmp_path: Path) -> None:
    """The second time the newest copy is damaged as well."""
    run, undisturbed, memory = tmp_path / "run", tmp_path / "undisturbed", tmp_path / "memory"
    memory.mkdir()
    training = [*LONG, f"data.path={corpus}", "train.steps=100000", "checkpoint.every=null"]
    copies = ["checkpoint.memory.every=5", f"checkpoint.memory.dir={memory}"]
    with job(2, *training, *copies, f"run.dir={run}", MAX_RESTARTS="9") as disturbed:
        wait_until(lambda: max(whole_copies(memory), default=0) >= 10)
        first = lose_other_host(disturbed, run, memory)[-1]
        disturbed.add_host()
        wait_until(lambda: max(whole_copies(memory), default=0) > first + 10)
        left = lose_other_host(disturbed, run, memory)
        [damaged] = memory.glob(f"*/step-{left[-1]:08}/rank-00000.safetensors")
        content = bytearray(damaged.read_bytes())
        content[-1] ^= 1
        damaged.write_bytes(content)
        disturbed.add_host()
        stop_in_start(3, disturbed, run)
        ended = disturbed.finish()
    output = "".join(said for _, said in ended)
    assert [code for code, _ in ended] == [75, -9, -9, 75], output
    assert first >= 5
    assert first % 5 == 0
    assert events(run, "start") == [0, first, left[-2]]
    assert len(events(run, "save")) == 1, "nothing was on disk before the run was asked to stop"
    assert "restart 1 of 9, from step 0 or a later one in memory" in output
    assert f"resuming from the copies in memory (step {first:,})" in output
    flaw = f"damaged copy in memory: step {left[-1]:,}, rank-00000.safetensors of host 0: another checksum"
    assert flaw in output
    assert not list(memory.iterdir()), "memory is free once the job has ended"
    with job(2, *training, f"run.dir={undisturbed}") as whole:
        stop_in_start(1, whole, undisturbed, len(losses(run)))
        whole.finish()
    assert losses(run) == losses(undisturbed)[: len(losses(run))], "bit for bit"
