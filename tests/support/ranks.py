"""A pool of gloo ranks that stays alive for many tests, in processes that start warm (see warm.py).

    results = ranks.run(2, function, argument, …)   # [rank 0's result, rank 1's result]

`function` must be importable (a module's own, no closure); arguments and results are pickled.

A rank is `python -m tests.support.ranks`, whose standard input is a pipe for both directions.
"""

from __future__ import annotations

import atexit
import functools
import importlib
import os
import sys
import traceback
from collections.abc import Callable
from multiprocessing import Pipe
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

PROGRAM = "tests.support.ranks"
REPOSITORY = Path(__file__).resolve().parents[2]
_POOLS: dict[int, Pool] = {}
TIMEOUT_SECONDS = 900
"""DeepSpeed compiles its CPU optimizer at first use: minutes on a busy machine."""


class Pool:
    """`size` processes in one process group."""

    def __init__(self, size: int) -> None:
        from tests.support.warm import Popen, rank_environment

        shared = {**_environment(), **rank_environment(size), "OMP_NUM_THREADS": "1"}
        self._pipes: list[Connection] = []
        self._processes = []
        for rank in range(size):
            ours, theirs = Pipe()
            own = {"RANK": str(rank), "LOCAL_RANK": str(rank)}
            process = Popen([], PROGRAM, stdin=theirs, env={**shared, **own}, cwd=REPOSITORY)
            theirs.close()
            ours.send(sys.path)  # pytest adds the folders of tests that are in no package
            self._pipes.append(ours)
            self._processes.append(process)

    def run(self, function: Callable[..., Any], *arguments: Any) -> list[Any]:
        function = _by_name(function)
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
            process.wait()
        _POOLS.pop(len(self._processes), None)


def _by_name(function: Callable[..., Any]) -> Callable[..., Any]:
    """Return the function of the module that runs as a program (`python -m`), which ranks import by its
    name."""
    if function.__module__ != "__main__":
        return function
    spec = sys.modules["__main__"].__spec__
    assert spec is not None, "start it with python -m"
    found: Callable[..., Any] = getattr(importlib.import_module(spec.name), function.__name__)
    return found


def run(size: int, function: Callable[..., Any], *arguments: Any) -> list[Any]:
    """`function(*arguments)` on each of `size` ranks; → their results in rank order."""
    if size not in _POOLS:
        # One pool at a time, lest memory runs out; a single process, for references, may stay beside it.
        for other in [pool for ranks, pool in _POOLS.items() if ranks > 1 and size > 1]:
            other.close()
        _POOLS[size] = Pool(size)
    return _POOLS[size].run(function, *arguments)


def renew(size: int) -> None:
    """Let the next run on `size` ranks have new processes, which have freed nothing yet."""
    if size in _POOLS:
        _POOLS[size].close()


@functools.cache
def _environment() -> dict[str, str]:
    """That of the first pool: what a later test sets is not for pools that outlive it."""
    return dict(os.environ)


def _serve(pipe: Connection) -> None:
    import cpuinfo
    import torch

    from llmtrain.distributed import processes
    from tests.support.warm import name_this_process

    name_this_process("pool")  # no rank of a run
    sys.path[:] = pipe.recv()
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


@atexit.register
def _close_all() -> None:
    for pool in list(_POOLS.values()):
        pool.close()


if __name__ == "__main__":
    _serve(Connection(os.dup(0)))
