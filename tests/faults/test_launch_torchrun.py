"""launch/torchrun.sh on two hosts: two network namespaces with addresses of their own, joined by a cable.

Both share this machine's name, which leads each of them to its own loopback: a rank that advertised it
could not be reached, so these tests fail unless the launcher picks the interface between the hosts.
One run starts from scratch by the script; the others start warm, without it (see support/warm.py).
Where the kernel lets nobody make namespaces, two launchers on the loopback take their place, with a warning.
"""

from __future__ import annotations

import json
import os
import signal
import socket
import subprocess
import time
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import numpy as np
import psutil
import pytest

from tests.support import warm
from tests.support.listening import STEERING
from tests.support.training import REPOSITORY, TINY_GPT
from tests.support.two_hosts import Hosts, NoNamespacesError, two_hosts
from tests.support.warm import llmtrain

pytestmark = pytest.mark.slow

TORCHRUN = REPOSITORY / "launch/torchrun.sh"
OPTIONS: dict[str, Any] = {
    "cwd": "/", "stdout": subprocess.PIPE, "stderr": subprocess.STDOUT, "text": True,
}  # fmt: skip
TRAINING = (
    *TINY_GPT, "optimizer.lr=3e-3", "seed=7", "device=cpu", "data.workers=0", "evaluation.max_samples=16",
)  # fmt: skip


def unavailable(reason: str) -> None:
    """Skip on a user's machine; fail where CI promises to have everything."""
    if os.environ.get("CI"):
        pytest.fail(f"CI must run this test: {reason}")
    pytest.skip(f"NOT TESTED HERE: {reason}")


def loopback_hosts(reason: str) -> Hosts:
    warnings.warn(
        f"NOT TESTED HERE: hosts with addresses of their own, only the loopback: {reason}", stacklevel=2
    )
    return Hosts("127.0.0.1", ((), ()), ({}, {}))


@pytest.fixture(scope="module")
def hosts() -> Iterator[Hosts]:
    with ExitStack() as stack:
        try:
            found = stack.enter_context(two_hosts())
        except NoNamespacesError as error:
            if os.environ.get("CI") and not error.is_kernel:
                pytest.fail(str(error))
            found = loopback_hosts(str(error))
        yield found


@pytest.fixture(scope="module")
def one_process(corpus: Path, tmp_path_factory: pytest.TempPathFactory) -> list[float]:
    """The losses of the same training in one process."""
    run = tmp_path_factory.mktemp("one") / "run"
    done = llmtrain("train", *TRAINING, f"data.path={corpus}", f"run.dir={run}", "train.steps=4")
    assert done.returncode == 0, done.stderr
    return losses(run)


def losses(run: Path) -> list[float]:
    records = map(json.loads, (run / "metrics.jsonl").read_text().splitlines())
    return [record["loss"] for record in records if "loss" in record]


def start(*overrides: str, **environment: str) -> warm.Popen:
    """A launcher that starts warm."""
    return warm.Popen(overrides, warm.TORCHRUN, env=clean(environment), **OPTIONS)


def start_cold(*overrides: str, prefix: Sequence[str] = (), **environment: str) -> subprocess.Popen[str]:
    """launch/torchrun.sh."""
    return subprocess.Popen([*prefix, str(TORCHRUN), *overrides], env=clean(environment), **OPTIONS)


def clean(environment: Mapping[str, str]) -> dict[str, str]:
    inherited = {name: value for name, value in os.environ.items() if name not in STEERING}
    return {**inherited, "OMP_NUM_THREADS": "1", **environment}


def start_on(
    hosts: Hosts, *overrides: str, is_cold: bool = False, **environment: str
) -> list[subprocess.Popen[str]]:
    """A launcher on each host."""
    each = [{"NNODES": "2", "NODE_RANK": str(rank), **environment} for rank in range(2)]
    if is_cold:
        return [
            start_cold(*overrides, prefix=prefix, **own)
            for prefix, own in zip(hosts.prefixes, each, strict=True)
        ]
    return [start(*overrides, **own, **entering) for own, entering in zip(each, hosts.entering, strict=True)]


def static(hosts: Hosts) -> dict[str, str]:
    return {"MASTER_ADDR": hosts.address, "MASTER_PORT": "29610"}


def numbering_themselves(hosts: Hosts) -> dict[str, str]:
    return {"RDZV_ENDPOINT": f"{hosts.address}:29611"}


def finish(processes: list[subprocess.Popen[str]]) -> list[tuple[int, str]]:
    """Each one's exit code and output."""
    try:
        # DeepSpeed may compile at first use.
        outputs = [process.communicate(timeout=240)[0] for process in processes]
    except subprocess.TimeoutExpired:
        for process in processes:
            process.terminate()
        outputs = [process.communicate(timeout=60)[0] for process in processes]
    return [(process.returncode, output) for process, output in zip(processes, outputs, strict=True)]


def wait_for_first_step(run: Path) -> None:
    deadline = time.monotonic() + 90
    metrics = run / "metrics.jsonl"
    while not (metrics.exists() and '"loss"' in metrics.read_text()):
        assert time.monotonic() < deadline, "training does not start"
        time.sleep(0.1)


def kill_rank(rank: int, launcher: subprocess.Popen[str]) -> None:
    """kill -9 the process of `rank` that `launcher` started."""
    children = psutil.Process(launcher.pid).children(recursive=True)
    [process] = [child for child in children if child.name() == f"rank {rank}"]
    process.send_signal(signal.SIGKILL)


@pytest.mark.parametrize(
    ("rendezvous", "overrides", "is_cold"),
    [(static, ["engine=local"], True), (numbering_themselves, ["parallel.zero=2"], False)],
    ids=["ranks known beforehand, DDP, cold", "hosts number themselves, ZeRO 2"],
)
def test_two_hosts_train_as_one_process(
    hosts: Hosts,
    one_process: list[float],
    corpus: Path,
    tmp_path: Path,
    rendezvous: Callable[[Hosts], dict[str, str]],
    overrides: list[str],
    is_cold: bool,
):
    run = tmp_path / "a run's folder"
    training = [*TRAINING, f"data.path={corpus}", f"run.dir={run}", "train.steps=4", *overrides]
    processes = start_on(hosts, *training, is_cold=is_cold, **rendezvous(hosts))
    for code, output in finish(processes):
        assert code == 0, output
    np.testing.assert_allclose(losses(run), one_process, rtol=1e-5)
    assert "step 4" in (run / "logs/rank0.log").read_text()
    assert (run / "logs/rank1.log").exists()


def test_a_killed_rank_gives_its_exit_code(hosts: Hosts, corpus: Path, tmp_path: Path):
    run = tmp_path / "run"
    endless = ["train.steps=100000", "evaluation.at_start=false"]
    processes = start_on(hosts, *TRAINING, f"data.path={corpus}", f"run.dir={run}", *endless, **static(hosts))
    try:
        wait_for_first_step(run)
        kill_rank(1, processes[1])
    finally:
        ended = finish(processes)
    (code_0, output_0), (code_1, output_1) = ended
    assert code_1 == 137, output_1
    told = f"rank 1 exited with 137 (killed by SIGKILL, maybe out of memory); its log: {run}/logs/rank1.log"
    assert told in output_1
    assert code_0 not in (0, 137), "its peer must not go on alone"
    assert "parameters; 100,000 steps" in output_0, "rank 0 speaks on its host's console"
    assert "parameters; 100,000 steps" not in output_1


@pytest.mark.parametrize("place", ["NODE_RANK=0", "NODE_RANK=1", "RDZV_ENDPOINT=127.0.0.1:29613"])
def test_a_host_that_never_comes(tmp_path: Path, place: str):
    environment = {"NNODES": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "29612", "START_TIMEOUT": "2"}
    [(code, output)] = finish([start(**environment, LOG_DIR=str(tmp_path), **dict([place.split("=")]))])
    assert code == 1, output
    told = [line for line in output.splitlines() if line.startswith("start: got ")]
    assert len(told) == 1, output
    assert "within 2 s" in told[0]
    assert told[0].endswith(
        "; see the messages of the other hosts, or wait longer with START_TIMEOUT=seconds"
    ) or (
        told[0].startswith("start: got no answer from host 0 at 127.0.0.1:29612") and place == "NODE_RANK=1"
    )
    assert "Traceback" not in output


def test_a_port_that_another_program_holds_is_told_at_once(tmp_path: Path):
    with socket.create_server(("127.0.0.1", 0)) as holder:
        port = holder.getsockname()[1]
        environment = {"NODE_RANK": "0", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
        [(code, output)] = finish([start(**environment, NNODES="2", LOG_DIR=str(tmp_path))])
    assert code == 2, output
    assert output.startswith(f"MASTER_PORT: got {port}, "), output
    assert "START_TIMEOUT" not in output
    assert "Traceback" not in output


def test_a_mistake_is_told_once(corpus: Path, tmp_path: Path):
    run = tmp_path / "run"
    overrides = [*TRAINING, f"data.path={corpus}", f"run.dir={run}", "model.num_leyers=2"]
    [(code, output)] = finish([start(*overrides, NPROC_PER_NODE="2")])
    assert code == 2, output
    assert output.count("model.num_leyers") == 1, output
    assert "num_layers" in output
    assert "Traceback" not in output
    assert {log.name for log in (run / "logs").iterdir()} == {"rank0.log", "rank1.log"}
    assert not (run / "metrics.jsonl").exists()
