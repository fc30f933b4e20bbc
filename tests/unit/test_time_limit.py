"""A test over its time fails, unless a mark says why it takes long."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

from tests.support.time_limit import SLOWNESS, allowed_seconds
from tests.support.training import REPOSITORY

TESTS = """
import time
import pytest

@pytest.fixture
def slow_setup():
    time.sleep(0.3)

def test_short():
    pass

def test_over(slow_setup):
    pass

@pytest.mark.long("it sleeps")
def test_over_with_a_reason(slow_setup):
    pass

def test_over_and_failing(slow_setup):
    assert not "a failure of its own"
"""
CONFTEST = """
from tests.support.time_limit import check, pytest_runtest_makereport

def pytest_configure(config):
    config.addinivalue_line("markers", "long(reason): why")

def pytest_collection_modifyitems(items):
    check(items)
"""


def run_pytest(folder: Path, tests: str, slowness: float) -> subprocess.CompletedProcess[str]:
    (folder / "conftest.py").write_text(CONFTEST)
    (folder / "test_some.py").write_text(tests)
    environment = {**os.environ, "PYTHONPATH": str(REPOSITORY), SLOWNESS: str(slowness)}
    environment["PYTEST_DISABLE_PLUGIN_AUTOLOAD"] = "1"  # their imports take most of the time
    command = [sys.executable, "-m", "pytest", "-c", os.devnull, "--rootdir", str(folder), str(folder)]
    command += ["-p", "no:cacheprovider", "-rA"]
    return subprocess.run(command, env=environment, cwd=folder, capture_output=True, text=True, timeout=60)


def test_a_test_over_its_time_fails_unless_it_says_why(tmp_path: Path):
    done = run_pytest(tmp_path, TESTS, slowness=0.01 / 60)
    assert done.returncode == 1, done.stdout
    for name, outcome in {
        "short": "PASSED",
        "over": "FAILED",
        "over_with_a_reason": "PASSED",
        "over_and_failing": "FAILED",
    }.items():
        assert f"{outcome} test_some.py::test_{name}" in done.stdout.replace("/test_", "test_"), done.stdout
    assert re.search(r"test_some.py::test_over: got \d+\.\d s; allowed: 0\.\d s; make it faster", done.stdout)
    assert "a failure of its own" in done.stdout


def test_a_slow_machine_has_more_time(tmp_path: Path):
    done = run_pytest(tmp_path, TESTS, slowness=1.0)
    assert "3 passed" in done.stdout
    assert "1 failed" in done.stdout


def test_a_mark_without_a_reason_is_refused(tmp_path: Path):
    done = run_pytest(tmp_path, "import pytest\n@pytest.mark.long\ndef test_a(): pass\n", slowness=1.0)
    assert done.returncode == 4
    assert "test_some.py::test_a: got pytest.mark.long without a reason" in done.stderr


@pytest.mark.parametrize("slowness", ["0", "-1", "much", "nan", "inf"])
def test_what_is_no_slowness(slowness: str):
    with pytest.raises(pytest.UsageError, match="LLMTRAIN_TEST_SLOWNESS: got "):
        allowed_seconds(slowness)
