"""Ways to start a run, and what its processes listen on while it goes on."""

from __future__ import annotations

import os
import signal
import socket
import subprocess
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path

import psutil

from tests.support import sockets
from tests.support.ranks import free_port
from tests.support.training import REPOSITORY, TINY_GPT
from tests.support.two_hosts import Hosts

TORCHRUN = (str(REPOSITORY / "launch/torchrun.sh"),)
TRAIN = (sys.executable, "-m", "llmtrain", "train")
ENDLESS = ("train.steps=100000", "device=cpu", "data.workers=1", "evaluation.at_start=false")
STEERING = ("MASTER_ADDR", "MASTER_PORT", "LOG_DIR", "GLOO_SOCKET_IFNAME", "NCCL_SOCKET_IFNAME")
"""What the environment of a test could say of ports and addresses."""

Command = tuple[Sequence[str], Mapping[str, str]]
"""Words and environment."""


def on_one_host(prefix: Sequence[str] = ()) -> dict[str, list[Command]]:
    """Ways to start a run on one host, by their names."""
    train, torchrun = (*prefix, *TRAIN), (*prefix, *TORCHRUN)
    hand = {"WORLD_SIZE": "2", "MASTER_ADDR": "localhost", "MASTER_PORT": str(free_port())}
    return {
        "llmtrain train": [(train, {})],
        "llmtrain train engine=deepspeed": [((*train, "engine=deepspeed"), {})],
        "torchrun.sh, 2 ranks": [((*torchrun, "parallel.zero=1"), {"NPROC_PER_NODE": "2"})],
        "by hand, 2 ranks": [(train, {**hand, "RANK": rank, "LOCAL_RANK": rank}) for rank in "01"],
    }


def on_two_hosts(hosts: Hosts) -> dict[str, list[Command]]:
    """Ways to start a run with a rank on each of two hosts, by their names."""
    train, torchrun = ([(*prefix, *words) for prefix in hosts.prefixes] for words in (TRAIN, TORCHRUN))
    launch = {"NNODES": "2", "NPROC_PER_NODE": "1"}
    known = {"MASTER_ADDR": hosts.address, "MASTER_PORT": str(free_port())}
    endpoint = {"RDZV_ENDPOINT": f"{hosts.address}:{free_port()}"}
    return {
        "torchrun.sh, NODE_RANK": [
            (words, {**launch, **known, "NODE_RANK": str(rank)}) for rank, words in enumerate(torchrun)
        ],
        "torchrun.sh, RDZV_ENDPOINT": [(words, {**launch, **endpoint}) for words in torchrun],
        "by hand, a rank a host": [
            (words, {**known, "WORLD_SIZE": "2", "RANK": str(rank)}) for rank, words in enumerate(train)
        ],
    }


def observe(commands: Sequence[Command], corpus: Path, run: Path) -> list[set[sockets.Listener]]:
    """What the processes of each command listened on at any look, from their start to the first step.

    Raises RuntimeError with the last thing said where one of them ends before.
    """
    training = (*TINY_GPT, *ENDLESS, f"data.path={corpus}", f"run.dir={run}")
    inherited = {name: value for name, value in os.environ.items() if name not in STEERING}
    run.parent.mkdir(parents=True, exist_ok=True)
    log = run.with_suffix(".log")
    with log.open("w") as output:
        started = [
            psutil.Popen(
                [*words, *training],
                env={**inherited, "OMP_NUM_THREADS": "1", **environment},
                stdout=output,
                stderr=subprocess.STDOUT,
                cwd=REPOSITORY,
            )
            for words, environment in commands
        ]
    metrics = run / "metrics.jsonl"

    def trains_or_ended() -> bool:
        trains = metrics.exists() and '"loss"' in metrics.read_text()
        return trains or any(process.poll() is not None for process in started)

    try:
        seen = sockets.watch(started, trains_or_ended)
    finally:
        for process in started:
            if process.poll() is None:
                for each in (*process.children(recursive=True), process):
                    each.kill()
        codes = [process.wait() for process in started]
    if any(code != -signal.SIGKILL for code in codes):
        raise RuntimeError(log.read_text().splitlines()[-1])
    return seen


def with_outer_name(prefix: Sequence[str], address: str, hosts_file: Path) -> tuple[str, ...]:
    """`prefix` of a network namespace, in which this machine's name leads to `address`, as a cloud's does;
    `hosts_file` is written for it."""
    hosts_file.write_text(f"127.0.0.1 localhost\n{address} {socket.gethostname()}\n")
    bind = 'mount --bind "$1" /etc/hosts && shift && exec "$@"'
    # `ip netns exec` gives each command mounts of its own.
    return (*prefix, "sh", "-c", bind, "sh", str(hosts_file))
