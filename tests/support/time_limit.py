"""A test that takes too long fails, unless its mark says why: `@pytest.mark.long("compiles a kernel")`.

Its time is that of its setup and of the test itself, by the clock. A test that is over it is judged by how
much of a core this process gets right then: where other programs leave it a third, three times as much is
allowed. LLMTRAIN_TEST_SLOWNESS=3 allows three times as much besides, for a machine that is slow.
"""

from __future__ import annotations

import os
import time
from collections.abc import Generator, Iterable

import pytest

LIMIT_SECONDS = 60.0
SLOWNESS = "LLMTRAIN_TEST_SLOWNESS"
_PROBE_SECONDS = 0.2
_TAKEN = pytest.StashKey[float]()


def check(items: Iterable[pytest.Item]) -> None:
    """Raise UsageError for a mark `long` that gives no reason, and for a bad LLMTRAIN_TEST_SLOWNESS."""
    allowed_seconds()
    for item in items:
        mark = item.get_closest_marker("long")
        if mark is not None and not (len(mark.args) == 1 and isinstance(mark.args[0], str)):
            raise pytest.UsageError(
                f"{item.nodeid}: got pytest.mark.long without a reason; allowed: long('why')"
            )


def allowed_seconds(given: str | None = None) -> float:
    """Raise UsageError for a slowness that is no positive number; `given`: default, the environment's."""
    given = os.environ.get(SLOWNESS, "1") if given is None else given
    try:
        slowness = float(given)
    except ValueError:
        slowness = 0.0
    if not 0 < slowness < float("inf"):
        raise pytest.UsageError(f"{SLOWNESS}: got {given!r}; allowed: a number above 0")
    return LIMIT_SECONDS * slowness


@pytest.hookimpl(wrapper=True)
def pytest_runtest_makereport(
    item: pytest.Item, call: pytest.CallInfo[None]
) -> Generator[None, pytest.TestReport, pytest.TestReport]:
    report = yield
    taken = item.stash.get(_TAKEN, 0.0) + call.duration
    item.stash[_TAKEN] = taken
    is_over = call.when == "call" and taken > allowed_seconds()
    if is_over and report.passed and item.get_closest_marker("long") is None:
        allowed = allowed_seconds() * seconds_per_cpu_second()
        if taken > allowed:
            report.outcome = "failed"
            report.longrepr = (
                f"{item.nodeid}: got {taken:.1f} s; allowed: {allowed:.1f} s; make it faster, mark it with "
                f"pytest.mark.long('why'), or set {SLOWNESS}=2 on a slow machine"
            )
    return report


def seconds_per_cpu_second() -> float:
    """Seconds by the clock in which this process gets a second of a core: 1 or more."""
    began, began_cpu = time.perf_counter(), time.process_time()
    while time.process_time() - began_cpu < _PROBE_SECONDS:
        pass
    return max(1.0, (time.perf_counter() - began) / (time.process_time() - began_cpu))
