"""Run tasks on a pool of worker processes; results arrive in order of completion, user errors unchanged."""

from __future__ import annotations

import multiprocessing
import os
import signal
import threading
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import FIRST_COMPLETED, Future, ProcessPoolExecutor, wait
from concurrent.futures.process import BrokenProcessPool
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Any

from llmtrain.errors import DataError, Problem
from llmtrain.orphans import end_with_parent
from llmtrain.prepare.files import disk_errors

_counter: Any = None


@dataclass(frozen=True)
class _Failure:
    """The problems of a DataError; a pickled exception would lose them, as only its text is kept."""

    problems: tuple[Problem, ...]


def count(amount: int) -> None:
    """Add to the count that the parent process shows while a task runs."""
    if _counter is not None:
        with _counter.get_lock():
            _counter.value += amount


class Workers:
    """A pool of `count` worker processes; with one, tasks run in this process, unless `spawn`.

    folder, bytes_needed: named in the error message of a full disk.
    """

    def __init__(self, count: int, folder: Path, bytes_needed: int, spawn: bool = False) -> None:
        global _counter
        self._count = count
        self._disk = (folder, bytes_needed)
        self._executor: ProcessPoolExecutor | None = None
        context = multiprocessing.get_context("spawn")
        self._counter = _counter = context.Value("q", 0)
        if count > 1 or spawn:
            self._executor = ProcessPoolExecutor(
                count, context, initializer=_start_worker, initargs=(self._counter,)
            )

    @property
    def counted(self) -> int:
        """The sum of all amounts that tasks have passed to `count`."""
        return self._counter.value

    def map(
        self,
        function: Callable[..., Any],
        tasks: Iterable[tuple[Any, ...]],
        on_tick: Callable[[], None] = lambda: None,
    ) -> Iterator[Any]:
        """Yield the results of function(*task) in order of completion.

        on_tick: called about twice a second while waiting.
        Raise the DataError of the first task that fails with one, or DataError if a worker was killed.
        """
        if self._executor is None:
            for task in tasks:
                yield _result(_guarded(self._disk, function, task))
            return
        pending: set[Future[Any]] = set()
        waiting = iter(tasks)
        try:
            while True:
                # Keep the queue short: there may be many tasks, and their arguments are made on demand.
                while len(pending) < 2 * self._count and (task := next(waiting, ())):
                    pending.add(self._submit(self._executor, function, task))
                if not pending:
                    return
                done, pending = wait(pending, timeout=0.5, return_when=FIRST_COMPLETED)
                on_tick()
                for future in done:
                    yield _result(future.result())
        except BrokenProcessPool as error:
            raise DataError(
                Problem(
                    "workers",
                    "a worker process that was killed, most often because memory ran out",
                    "",
                    "lower workers and run the same command again: finished work is kept",
                )
            ) from error

    def _submit(
        self, executor: ProcessPoolExecutor, function: Callable[..., Any], task: tuple[Any, ...]
    ) -> Future[Any]:
        try:
            return executor.submit(_guarded, self._disk, function, task)
        except OSError as error:
            # The executor's thread noticed a dead worker and closed its wakeup pipe after submit had checked
            # the state of the executor and before it wrote to the pipe.
            raise BrokenProcessPool(str(error)) from error

    def __enter__(self) -> Workers:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        if self._executor is None:
            return
        if error is not None:
            for process in list((self._executor._processes or {}).values()):
                process.kill()
        try:
            self._executor.shutdown(wait=True, cancel_futures=True)
        except OSError:
            # The same closed pipe; a broken executor has already shut down.
            if error is None:
                raise


def _start_worker(counter: Any) -> None:
    global _counter
    _counter = counter
    # The parent handles interrupts; workers must end with the parent, however it ends.
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    end_with_parent()
    threading.Thread(target=_end_with_parent, daemon=True).start()


def _end_with_parent() -> None:
    parent = multiprocessing.parent_process()
    if parent is not None:
        parent.join()
        os._exit(1)


def _guarded(disk: tuple[Path, int], function: Callable[..., Any], task: tuple[Any, ...]) -> Any:
    try:
        with disk_errors(*disk):
            return function(*task)
    except DataError as error:
        return _Failure(error.problems)


def _result(value: Any) -> Any:
    if isinstance(value, _Failure):
        raise DataError(value.problems)
    return value
