"""An elastic job goes on without the host that serves its store."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from tests.faults.test_launch_torchrun import losses
from tests.faults.test_memory_copies import whole_copies
from tests.faults.test_restarts import LONG, events, job, kill_host, stop_in_start, wait_until

pytestmark = pytest.mark.slow


@pytest.mark.long("the launchers that are left, and their ranks, start from scratch")
def test_the_first_host_is_gone_for_good(corpus: Path, tmp_path: Path) -> None:
    """The others meet at the second, and go on from their copies in memory with a layout of two."""
    run, undisturbed, memory = tmp_path / "run", tmp_path / "undisturbed", tmp_path / "memory"
    memory.mkdir()
    training = [*LONG, f"data.path={corpus}", "train.steps=100000", "batch.global_size=12", "parallel.data=3"]
    copies = ["checkpoint.every=null", "checkpoint.memory.every=5", f"checkpoint.memory.dir={memory}"]
    with job(3, *training, *copies, f"run.dir={run}", NNODES="2:3", JOIN_TIMEOUT="4") as disturbed:
        wait_until(lambda: max(whole_copies(memory), default=0) >= 10)
        kill_host(disturbed.launchers[0])
        wait_until(lambda: len(events(run, "start")) == 2, 240)
        stop_in_start(2, disturbed, run)
        ended = disturbed.finish()
    output = "".join(said for _, said in ended)
    assert [code for code, _ in ended] == [-9, 75, 75], output
    first, second = events(run, "start")
    assert (first, second % 5) == (0, 0)
    assert second > 0, "nothing was on disk"
    assert output.count("llmtrain: host 0 is lost: looking for another host to meet at\n") == 2
    told = "llmtrain: host 0 is lost, and this host takes its place: restart 1 of 100, from step 0 or a later"
    assert output.count(told) == 1
    assert "note: parallel.data was 3 and is 2" in output
    assert not list(memory.iterdir())
    count = len(losses(run))
    with job(1, *training, f"run.dir={undisturbed}", "parallel.data=1") as whole:
        stop_in_start(1, whole, undisturbed, count)
        whole.finish()
    np.testing.assert_allclose(losses(run), losses(undisturbed)[:count], rtol=1e-5)
