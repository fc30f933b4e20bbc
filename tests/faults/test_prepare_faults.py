"""`prepare` killed at every step, on a full disk, twice at once: it goes on, and the result is the same."""

import errno
import fcntl
import json
import os
import shutil
import signal
import subprocess
import time
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import psutil
import pytest

from llmtrain.errors import DataError
from llmtrain.prepare.config import PrepareConfig
from llmtrain.prepare.files import disk_errors
from llmtrain.prepare.job import prepare
from tests.support.preparing import tree
from tests.support.warm import LAUNCHERS, Popen

KILLS = [
    ("/read/", 3, 0),
    ("/near/000001", 3, 1),
    ("/near/pairs-", 2, 1),
    ("/tokenizer.model", 3, 0),
    ("/encoded/", 2, 1),
    ("/corpus/train/", 3, 1),
    ("/manifest.json", 2, 0),
]
"""(what a process of the job dies at, how many there are, which dies)"""


NEAR: dict[str, object] = {"near_duplicates": {"threshold": 0.8}}


@pytest.fixture(scope="module")
def sources(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("sources")
    rng = np.random.default_rng(0)
    words = ["".join(rng.choice([*"aeioubcdfglmnrstü"], rng.integers(2, 9))) for _ in range(300)]
    for name in ("a", "b"):
        texts = [f"{i} " + " ".join(rng.choice(words, rng.integers(3, 40))) for i in range(100)]
        rows = [*texts, *texts[::7], ""]
        lines = (json.dumps({"text": text, "backwards": text[::-1]}) + "\n" for text in rows)
        (folder / f"{name}.jsonl").write_text("".join(lines))
    return folder


@pytest.fixture
def folder(sources: Path) -> Iterator[Path]:
    """The folder of two sources, for corpora beside them: a corpus names the paths of its sources."""
    yield sources
    for corpus in sources.iterdir():
        if corpus.is_dir() and corpus.name != "whole":
            shutil.rmtree(corpus)


@pytest.fixture(scope="module")
def whole(sources: Path) -> dict[str, bytes]:
    """The corpus that one process makes of the sources undisturbed."""
    assert finish(start(sources, "whole")) == (0, "")
    return tree(sources / "whole")


def start(folder: Path, output: str, workers: int = 1, **options: object) -> Popen:
    """`options` are environment variables in capitals, and settings of prepare."""
    environment = {key: str(value) for key, value in options.items() if key.isupper()}
    config = {
        "source": [str(folder / "a.jsonl"), str(folder / "b.jsonl")],
        "output": str(folder / output),
        "tokenizer": {"vocab_size": 330},
        "split": {"validation": 0.2, "test": 0.1},
        "sample_tokens": 500,
        "tar_bytes": 15_000,
        "workers": workers,
        **{key: value for key, value in options.items() if not key.isupper()},
    }
    return Popen(
        [json.dumps(config)],
        "tests.support.prepare_runner",
        env={**os.environ, "OMP_NUM_THREADS": "1", **environment},
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,
    )


def start_job(folder: Path, output: str, size: int, **options: object) -> list[Popen]:
    """Processes of one job; options of one rank's environment are named NAME_RANK."""
    ranks = []
    for rank in range(size):
        own = {key: value for key, value in options.items() if key[-2:-1] != "_"}
        own |= {key[:-2]: value for key, value in options.items() if key.endswith(f"_{rank}")}
        ranks.append(start(folder, output, RANK=rank, SIZE=size, **own))
    return ranks


def finish(process: Popen) -> tuple[int, str]:
    """Exit code and standard error."""
    _, error = process.communicate(timeout=120)
    return process.returncode, error


def wait_for_pieces(output: Path, number: int) -> None:
    """Until so many pieces of the sources are read."""
    deadline = time.monotonic() + 90
    while len(list((output / ".prepare" / "read").glob("*/unit.json"))) < number:
        assert time.monotonic() < deadline
        time.sleep(0.002)


@pytest.mark.slow
@pytest.mark.parametrize(("die", "fields"), [("before", {}), ("after", {"target_field": "backwards"})])
def test_killed_again_and_again_it_goes_on_to_the_same_bytes(
    folder: Path, die: str, fields: dict[str, object]
):
    assert finish(start(folder, "undisturbed", **fields)) == (0, "")
    kills = planted = 0
    while True:
        # Indexes, lengths and manifest, seven renames together, are cheap and made again by each run.
        code, error = finish(start(folder, "killed", DIE=die, DIE_AT=8 + kills % 3, **fields))
        if code == 0:
            break
        assert (code, error) == (-signal.SIGKILL, "")
        kills += 1
        assert kills < 30
        work = folder / "killed" / ".prepare"
        half_written = work / "corpus" / "train"
        if half_written.is_dir() and not (work / "manifest.json").exists():
            (half_written / ".train-000000.tar.1.tmp").write_text("half a shard")
            planted += 1
    assert kills >= 5
    assert planted
    assert tree(folder / "killed") == tree(folder / "undisturbed")


@pytest.mark.slow
def test_replacing_a_corpus_and_killed_at_every_step(folder: Path, whole: dict[str, bytes]):
    """Until the new corpus is whole the old one stands; whatever has a manifest is one of the two."""
    output = folder / "corpus"
    assert finish(start(folder, "corpus", seed=1)) == (0, "")
    old = tree(output)
    for _ in range(100):
        code, _ = finish(start(folder, "corpus", DIE="before", DIE_AT=9, overwrite=True))
        if (output / "manifest.json").exists():
            standing = {name: data for name, data in tree(output).items() if not name.startswith(".prepare")}
            assert standing in (old, whole)
        if code == 0:
            break
    assert code == 0
    assert tree(output) == whole


@pytest.mark.slow
def test_many_processes_killed_at_any_time_give_the_bytes_of_one(folder: Path, whole: dict[str, bytes]):
    for workers, pieces in ((2, 1), (3, 6)):
        process = start(folder, "many", workers=workers)
        wait_for_pieces(folder / "many", pieces)
        os.killpg(process.pid, signal.SIGKILL)
        process.communicate()
    assert finish(start(folder, "many", workers=2)) == (0, "")
    assert tree(folder / "many") == whole


@pytest.mark.slow
def test_a_job_killed_in_each_stage_goes_on_with_another_number_of_processes(folder: Path):
    """One process dies as it ends a piece of a stage; the others end by themselves with a line that names
    it."""
    assert finish(start(folder, "one", **NEAR)) == (0, "")
    for number, (stage, size, victim) in enumerate(KILLS):
        kill = {
            f"DIE_{victim}": ("before", "after")[number % 2],
            f"DIE_AT_{victim}": 1,
            f"DIE_IN_{victim}": stage,
        }
        results = [finish(process) for process in start_job(folder, "many", size, **kill, **NEAR)]
        assert results[victim] == (-signal.SIGKILL, ""), stage
        for rank, (code, error) in enumerate(results):
            if rank != victim:
                assert code == 1, stage
                (line,) = error.strip().splitlines()
                assert line.startswith(f"rank {victim} on ")
                assert "a process that ended before its work was done" in line
    assert [finish(process) for process in start_job(folder, "many", 2, **NEAR)] == [(0, "")] * 2
    assert tree(folder / "many") == tree(folder / "one")


@pytest.mark.slow
def test_a_job_refuses_another_and_processes_of_other_settings(folder: Path):
    slow = start_job(folder, "corpus", 2, SLOW=1)
    read = folder / "corpus" / ".prepare" / "read"
    deadline = time.monotonic() + 90
    while not read.exists():
        assert time.monotonic() < deadline
        time.sleep(0.01)
    code, error = finish(start(folder, "corpus"))
    assert code == 1
    assert "got a folder in which another prepare is running; wait for it to end" in error
    assert [finish(process) for process in slow] == [(0, "")] * 2
    first, second = start_job(folder, "mixed", 2, seed_1=5)
    for code, error in (finish(first), finish(second)):
        assert code == 1
        assert error.startswith("rank 1: got other settings or sources than rank 0 has; start all processes")
    assert finish(start(folder, "corpus")) == (0, "")


@pytest.mark.slow
def test_a_finished_corpus_is_left_by_a_job_too(folder: Path):
    assert finish(start(folder, "corpus")) == (0, "")
    before = tree(folder / "corpus")
    assert [finish(process) for process in start_job(folder, "corpus", 3)] == [(0, "")] * 3
    assert tree(folder / "corpus") == before
    again = [finish(process) for process in start_job(folder, "corpus", 2, seed=4)]
    for code, error in again:
        assert code == 1
        assert "a corpus of other sources or settings: seed is 0 there and 4 here" in error
    assert [finish(process) for process in start_job(folder, "corpus", 2)] == [(0, "")] * 2
    assert tree(folder / "corpus") == before


@pytest.mark.slow
def test_processes_of_torchrun_prepare_one_corpus(folder: Path):
    shared = [f"source={folder}/a.jsonl", "tokenizer.vocab_size=330", "tar_bytes=15000"]
    torchrun = ["--standalone", "--nproc-per-node=2", "-m", "llmtrain"]
    for program, before, output in ((LAUNCHERS[1], torchrun, "two"), ("llmtrain", [], "one")):
        process = Popen(
            [*before, "prepare", *shared, f"output={folder / output}"],
            program,
            env={**os.environ, "OMP_NUM_THREADS": "1"},
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        told, error = process.communicate(timeout=120)
        assert process.returncode == 0, error
        assert told.count("encoding …") == 1
    assert tree(folder / "one") == tree(folder / "two")


@pytest.mark.slow
def test_workers_end_with_their_parent(folder: Path):
    process = start(folder, "corpus", workers=2)
    # Workers that have finished something are past their start, which a dead parent ends anyway.
    wait_for_pieces(folder / "corpus", 1)
    children = psutil.Process(process.pid).children(recursive=True)
    assert len(children) >= 2
    process.kill()
    process.wait()
    _, alive = psutil.wait_procs(children, timeout=60)
    assert not alive


@pytest.mark.slow
def test_a_worker_that_the_system_kills_is_told(folder: Path):
    process = start(folder, "corpus", workers=2)
    parent = psutil.Process(process.pid)
    deadline = time.monotonic() + 90
    # Both: the library's own thread fails, in so many lines, where one dies while the other is begun.
    while len(workers := [p for p in parent.children() if "spawn_main" in " ".join(p.cmdline())]) < 2:
        assert time.monotonic() < deadline
        time.sleep(0.005)
    workers[0].kill()
    code, error = finish(process)
    assert code == 1
    assert "workers: got a worker process that was killed" in error
    assert len(error.strip().splitlines()) == 1
    assert finish(start(folder, "corpus", workers=2)) == (0, "")


@pytest.mark.slow
@pytest.mark.parametrize("workers", [1, 2])
def test_a_full_disk_is_one_line_and_the_work_goes_on_later(
    folder: Path, whole: dict[str, bytes], workers: int
):
    code, error = finish(start(folder, "full", workers=workers, FILE_BYTES=12_000))
    assert code == 1, error
    (line,) = error.strip().splitlines()
    assert str(folder / "full") in line
    assert "got a full disk" in line
    assert "bytes for the job" in line
    assert not (folder / "full" / "manifest.json").exists()
    assert list((folder / "full" / ".prepare" / "read").glob("*/unit.json"))
    assert finish(start(folder, "full", workers=workers)) == (0, "")
    assert tree(folder / "full") == whole


def test_a_device_without_space_is_told_with_the_path_and_the_bytes_needed(tmp_path: Path):
    with (
        pytest.raises(DataError, match=r"corpus: got a full disk \(No space left.*about 1,234 bytes"),
        disk_errors(tmp_path / "corpus", 1234),
        open("/dev/full", "wb") as device,
    ):
        device.write(b"x" * 100_000)


def test_a_read_only_file_system_is_told(tmp_path: Path):
    with (
        pytest.raises(DataError, match="got a location that is not writable"),
        disk_errors(tmp_path, 1),
    ):
        raise OSError(errno.EROFS, "Read-only file system", str(tmp_path))


def test_two_at_once_in_one_folder(tmp_path: Path):
    (tmp_path / "a.txt").write_text("some text")
    (tmp_path / "corpus").mkdir()
    descriptor = os.open(tmp_path / "corpus", os.O_RDONLY)
    fcntl.flock(descriptor, fcntl.LOCK_EX)
    try:
        with pytest.raises(DataError, match="another prepare is running"):
            prepare(PrepareConfig(source=(str(tmp_path / "a.txt"),), output=tmp_path / "corpus", workers=1))
    finally:
        os.close(descriptor)
