"""Fixtures that many rooms share."""

from __future__ import annotations

import gc
import os
import subprocess
import sys
from collections import Counter
from collections.abc import Iterator
from pathlib import Path

import hypothesis
import pytest

from llmtrain.corpus import transport
from tests.support import kernel, peak, time_limit, turns  # noqa: F401
from tests.support.corpora import prepare_small_corpus, prepare_small_pairs

IS_RANK = "LOCAL_RANK" in os.environ
gc.disable()  # until tests are collected: a tenth of the time, for nothing
pytest_runtest_makereport = time_limit.pytest_runtest_makereport
os.environ.setdefault(kernel.VARIABLE, kernel.FOLDER)
# No example has a time limit: other programs may have the machine just then.
hypothesis.settings.register_profile("suite", deadline=None)
hypothesis.settings.load_profile("suite")


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption(
        "--whole-matrix",
        action="store_true",
        default=os.environ.get(turns.WHOLE) == "all",
        help="run every cell of the parity matrix and every case of tests in turns, not this commit's part; "
        f"also {turns.WHOLE}=all",
    )


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """Fast tests first, which tell most in a minute; of several processes slow ones, files with the most long
    ones first, so that none is left with a long file when the others have done."""
    time_limit.check(items)
    turns.take_part(config, items)
    long_tests = Counter(item.path for item in items if item.get_closest_marker("long"))

    def slowness(item: pytest.Item) -> int:
        return 0 if item.get_closest_marker("slow") is None else 1 + long_tests[item.path]

    items.sort(key=slowness, reverse=hasattr(config, "workerinput"))


def pytest_runtest_setup() -> None:
    """A library compiled with -ffast-math, such as DeepSpeed's Adam, lets the thread that loads it take the
    smallest numbers for 0, which hypothesis refuses: each test begins without that."""
    if "torch" in sys.modules:
        sys.modules["torch"].set_flush_denormal(False)


def pytest_collection_finish() -> None:
    """What was imported and collected stays to the end: collections of garbage need not look at it."""
    gc.freeze()
    gc.enable()


@pytest.fixture(scope="session", autouse=True)
def data_sets(tmp_path_factory: pytest.TempPathFactory) -> None:
    """What the library `datasets` keeps of files of tasks lies among the tests' folders."""
    os.environ.setdefault("HF_DATASETS_CACHE", str(tmp_path_factory.mktemp("data_sets")))


@pytest.fixture(autouse=True)
def no_rank() -> Iterator[None]:
    """DeepSpeed, once imported here, leaves a LOCAL_RANK, by which accelerate would look for other ranks."""
    yield
    if not IS_RANK:
        os.environ.pop("LOCAL_RANK", None)


@pytest.fixture(scope="session")
def corpus(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A small corpus that `llmtrain prepare` made."""
    return prepare_small_corpus(tmp_path_factory.mktemp("corpus"))


@pytest.fixture(scope="session")
def paired_corpus(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A small corpus of pairs that `llmtrain prepare` made, of several shards."""
    return prepare_small_pairs(tmp_path_factory.mktemp("paired_corpus"))


@pytest.fixture
def short_waits(monkeypatch: pytest.MonkeyPatch) -> None:
    """Files from elsewhere that fail are asked for again at once."""
    monkeypatch.setattr(transport, "FIRST_WAIT", 0.001)


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    """A disk of 1 MiB."""
    folder = tmp_path / "disk"
    folder.mkdir()
    mounted = subprocess.run(["mount", "-t", "tmpfs", "-o", "size=1m", "tmpfs", folder], capture_output=True)
    if mounted.returncode != 0:
        if os.environ.get("CI"):
            pytest.fail(f"cannot mount a small disk: {mounted.stderr!r}")
        pytest.skip("a small disk needs root")
    yield folder
    # Lazily: threads of a test may have files open still.
    subprocess.run(["umount", "-l", folder], check=True)
