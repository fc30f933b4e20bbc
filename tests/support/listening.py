"""Ways to start a run, and what its processes listen on while it goes on."""

from __future__ import annotations

import os
import signal
import socket
import subprocess
import sys
from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import IO, Any, NamedTuple

import psutil

from tests.support import sockets, warm
from tests.support.ports import free_port
from tests.support.training import REPOSITORY, TINY_GPT
from tests.support.two_hosts import Hosts, entering

TORCHRUN = (str(REPOSITORY / "launch/torchrun.sh"),)
TRAIN = (sys.executable, "-m", "llmtrain", "train")
WARM = {TORCHRUN: (warm.TORCHRUN,), TRAIN: ("llmtrain", "train")}
"""Program and first arguments of each one's warm start, without the script."""
ENDLESS = ("train.steps=100000", "device=cpu", "data.workers=1", "evaluation.at_start=false")
STEERING = ("MASTER_ADDR", "MASTER_PORT", "LOG_DIR", "GLOO_SOCKET_IFNAME", "NCCL_SOCKET_IFNAME")
"""What the environment of a test could say of ports and addresses."""


class Command(NamedTuple):
    prefix: Sequence[str]
    """What starts it on its host."""
    program: tuple[str, ...]
    """TORCHRUN or TRAIN."""
    overrides: tuple[str, ...] = ()
    environment: Mapping[str, str] = {}

    def start(
        self, training: Sequence[str], output: IO[str], entering: Mapping[str, str] | None
    ) -> subprocess.Popen:
        """Start it from scratch, or warm (see warm.py) with the environment of two_hosts.entering."""
        inherited = {name: value for name, value in os.environ.items() if name not in STEERING}
        environment = {**inherited, "OMP_NUM_THREADS": "1", **self.environment, **(entering or {})}
        options: dict[str, Any] = {"stdout": output, "stderr": subprocess.STDOUT, "cwd": REPOSITORY}
        words = (*self.overrides, *training)
        if entering is None:
            return subprocess.Popen([*self.prefix, *self.program, *words], env=environment, **options)
        program, *first = WARM[self.program]
        return warm.Popen([*first, *words], program, env=environment, **options)


def on_one_host(prefix: Sequence[str] = ()) -> dict[str, list[Command]]:
    """Ways to start a run on one host, by their names."""
    hand = {"WORLD_SIZE": "2", "MASTER_ADDR": "localhost", "MASTER_PORT": str(free_port())}
    return {
        "llmtrain train": [Command(prefix, TRAIN)],
        "llmtrain train engine=deepspeed": [Command(prefix, TRAIN, ("engine=deepspeed",))],
        "torchrun.sh, 2 ranks": [Command(prefix, TORCHRUN, ("parallel.zero=1",), {"NPROC_PER_NODE": "2"})],
        "by hand, 2 ranks": [
            Command(prefix, TRAIN, environment={**hand, "RANK": rank, "LOCAL_RANK": rank}) for rank in "01"
        ],
    }


def on_two_hosts(hosts: Hosts) -> dict[str, list[Command]]:
    """Ways to start a run with a rank on each of two hosts, by their names."""
    launch = {"NNODES": "2", "NPROC_PER_NODE": "1"}
    known = {"MASTER_ADDR": hosts.address, "MASTER_PORT": str(free_port())}
    endpoint = {"RDZV_ENDPOINT": f"{hosts.address}:{free_port()}"}
    return {
        "torchrun.sh, NODE_RANK": [
            Command(prefix, TORCHRUN, environment={**launch, **known, "NODE_RANK": str(rank)})
            for rank, prefix in enumerate(hosts.prefixes)
        ],
        "torchrun.sh, RDZV_ENDPOINT": [
            Command(prefix, TORCHRUN, environment={**launch, **endpoint}) for prefix in hosts.prefixes
        ],
        "by hand, a rank a host": [
            Command(prefix, TRAIN, environment={**known, "WORLD_SIZE": "2", "RANK": str(rank)})
            for rank, prefix in enumerate(hosts.prefixes)
        ],
    }


def observe(
    commands: Sequence[Command], corpus: Path, run: Path, *, is_warm: bool = False
) -> list[set[sockets.Listener]]:
    """What the processes of each command listened on at any look, from their start to the first step.

    Raises RuntimeError with the last thing said where one of them ends before.
    """
    training = (*TINY_GPT, *ENDLESS, f"data.path={corpus}", f"run.dir={run}")
    run.parent.mkdir(parents=True, exist_ok=True)
    log = run.with_suffix(".log")
    with ExitStack() as stack, log.open("w") as output:
        started = []
        for number, command in enumerate(commands):
            file = run.with_suffix(f".{number}.py")
            environment = stack.enter_context(entering(command.prefix, file)) if is_warm else None
            started.append(command.start(training, output, environment))
        seen, codes = _watch(started, run)
    if any(code != -signal.SIGKILL for code in codes):
        raise RuntimeError(log.read_text().splitlines()[-1])
    return seen


def _watch(started: Sequence[subprocess.Popen], run: Path) -> tuple[list[set[sockets.Listener]], list[int]]:
    """What each listened on until the first step, and the exit code of each: all are killed then."""
    roots = [psutil.Process(process.pid) for process in started]
    metrics = run / "metrics.jsonl"

    def trains_or_ended() -> bool:
        trains = metrics.exists() and '"loss"' in metrics.read_text()
        return trains or any(process.poll() is not None for process in started)

    try:
        seen = sockets.watch(roots, trains_or_ended)
    finally:
        for process, root in zip(started, roots, strict=True):
            if process.poll() is None:
                for each in (*root.children(recursive=True), root):
                    each.kill()
        codes = [process.wait() for process in started]
    return seen, codes


def with_outer_name(prefix: Sequence[str], address: str, hosts_file: Path) -> tuple[str, ...]:
    """`prefix` of a network namespace, in which this machine's name leads to `address`, as a cloud's does;
    `hosts_file` is written for it."""
    hosts_file.write_text(f"127.0.0.1 localhost\n{address} {socket.gethostname()}\n")
    bind = 'mount --bind "$1" /etc/hosts && shift && exec "$@"'
    # `ip netns exec` gives each command mounts of its own.
    return (*prefix, "sh", "-c", bind, "sh", str(hosts_file))
