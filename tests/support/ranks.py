"""A pool of gloo ranks that stays alive for many tests, forked from a process that has imported torch and
DeepSpeed, which costs seconds.

    results = ranks.run(2, function, argument, …)   # [rank 0's result, rank 1's result]

`function` must be importable (a module's own, no closure); arguments and results are pickled.
"""

from __future__ import annotations

import atexit
import functools
import multiprocessing
import os
import socket
import traceback
from collections.abc import Callable
from multiprocessing.connection import Connection
from typing import Any

_POOLS: dict[int, Pool] = {}
TIMEOUT_SECONDS = 900
"""DeepSpeed compiles its CPU optimizer at first use: minutes on a busy machine."""


class Pool:
    """`size` processes in one process group."""

    def __init__(self, size: int) -> None:
        context = multiprocessing.get_context("forkserver")
        context.set_forkserver_preload(["tests.support.everything"])
        port = free_port()
        self._pipes: list[Connection] = []
        self._processes = []
        for rank in range(size):
            ours, theirs = context.Pipe()
            process = context.Process(target=_serve, args=(theirs, rank, size, port), daemon=True)
            process.start()
            self._pipes.append(ours)
            self._processes.append(process)

    def run(self, function: Callable[..., Any], *arguments: Any) -> list[Any]:
        for pipe in self._pipes:
            pipe.send((function, arguments))
        results, failures = [], []
        for rank, pipe in enumerate(self._pipes):
            if not pipe.poll(TIMEOUT_SECONDS):
                self.close()
                raise TimeoutError(f"rank {rank} gave no answer in {TIMEOUT_SECONDS} s")
            result, failure = pipe.recv()
            results.append(result)
            if failure:
                failures.append(f"rank {rank}:\n{failure}")
        if failures:
            self.close()  # ranks may be out of step with each other now
            raise AssertionError("\n".join(failures))
        return results

    def close(self) -> None:
        for process in self._processes:
            process.kill()
        _POOLS.pop(len(self._processes), None)


def run(size: int, function: Callable[..., Any], *arguments: Any) -> list[Any]:
    """`function(*arguments)` on each of `size` ranks; → their results in rank order."""
    if size not in _POOLS:
        # One pool at a time, lest memory runs out; a single process, for references, may stay beside it.
        for other in [pool for ranks, pool in _POOLS.items() if ranks > 1 and size > 1]:
            other.close()
        _POOLS[size] = Pool(size)
    return _POOLS[size].run(function, *arguments)


def _serve(pipe: Connection, rank: int, size: int, port: int) -> None:
    os.environ |= {
        "RANK": str(rank),
        "LOCAL_RANK": str(rank),
        "WORLD_SIZE": str(size),
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": str(port),
        "OMP_NUM_THREADS": "1",
    }
    import cpuinfo
    import torch

    from llmtrain.distributed import processes

    # DeepSpeed asks for it before each of its CPU optimizers; a second and several processes each time.
    cpuinfo.get_cpu_info = functools.cache(cpuinfo.get_cpu_info)
    torch.set_num_threads(1)
    processes.start(torch.device("cpu"), single_process_group=True)
    while True:
        try:
            function, arguments = pipe.recv()
        except EOFError:
            os._exit(0)
        try:
            pipe.send((function(*arguments), None))
        except BaseException:
            pipe.send((None, traceback.format_exc()))


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


@atexit.register
def _close_all() -> None:
    for pool in list(_POOLS.values()):
        pool.close()
