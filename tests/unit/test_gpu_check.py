"""`python -m tests.gpu`: its table holds whatever happens to a part, and its logic runs on a CPU."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.gpu import table
from tests.gpu.parts import PARTS, Part, run
from tests.gpu.table import REPOSITORY, Row, judged
from tests.parity.matrix import FAMILIES
from tests.support.warm import Popen, finish

HERE = "tests.unit.test_gpu_check"


def good(device: str, folder: Path) -> Iterator[Row]:
    yield judged("good", "holds", True, f"on a {device}")


def wrong(device: str, folder: Path) -> Iterator[Row]:
    yield judged("wrong", "holds", True, "")
    yield judged("wrong", "differs", False, "2 | 1")


def raises(device: str, folder: Path) -> Iterator[Row]:
    yield judged("raises", "first", True, "")
    raise RuntimeError("an illegal memory access")


def dies(device: str, folder: Path) -> Iterator[Row]:
    yield judged("dies", "first", True, "")
    os.kill(os.getpid(), signal.SIGSEGV)


def hangs(device: str, folder: Path) -> Iterator[Row]:
    child = subprocess.Popen(["sleep", "1000"])
    (folder / "child").write_text(str(child.pid))
    yield judged("hangs", "first", True, "")
    time.sleep(1000)


def asks_nothing(device: str, folder: Path) -> Iterator[Row]:
    return iter(())


def results(part: Part, folder: Path, minutes: float = 1.0) -> list[tuple[str, str, str]]:
    rows = run([part], "cpu", folder, lambda rows: None, minutes)
    assert all(row.part == part.name for row in rows)
    return [(row.check, row.result, row.detail) for row in rows]


def part(name: str, seconds: float = 30.0, packages: tuple[str, ...] = ()) -> Part:
    return Part(name, f"{HERE}:{name}", seconds, packages)


def test_a_broken_part_is_a_row_and_keeps_what_it_found(tmp_path: Path) -> None:
    (first, last) = results(part("raises"), tmp_path)
    assert first[1] == "ok"
    assert last == ("all of it", "FAILED", "ended with 1: RuntimeError: an illegal memory access")
    (first, last) = results(part("dies"), tmp_path)
    assert first[1] == "ok"
    assert last[1:] == ("FAILED", "was ended by SIGSEGV: it said nothing")
    assert results(part("asks_nothing"), tmp_path) == [("all of it", "FAILED", "it asked nothing")]
    assert results(part("wrong"), tmp_path)[1] == ("differs", "FAILED", "2 | 1")


def test_a_part_that_hangs_is_ended_with_all_that_it_started(tmp_path: Path) -> None:
    # Time enough for the start of a process on a machine with other work.
    (first, last) = results(part("hangs", 20.0), tmp_path)
    assert first[1] == "ok"
    assert last[:2] == ("all of it", "FAILED")
    assert last[2].startswith("not done within 20 s")
    assert ends(int((tmp_path / "child").read_text()))


def ends(pid: int, seconds: float = 20.0) -> bool:
    """A killed process is gone, or waits for its parent, as soon as the kernel has come to it."""
    limit = time.monotonic() + seconds
    while time.monotonic() < limit:
        try:
            if Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] == "Z":
                return True
        except (FileNotFoundError, ProcessLookupError):
            return True
        time.sleep(0.05)
    return False


def test_what_cannot_be_asked_is_named(tmp_path: Path) -> None:
    (row,) = results(part("good", packages=("json", "no_such_package")), tmp_path)
    assert row == ("all of it", "passed over", "there is no no_such_package here")
    (row,) = results(part("good"), tmp_path, minutes=0.0)
    assert row[1:] == ("FAILED", "not begun: the 0 minutes are over")


def test_the_table_is_written_after_each_part(tmp_path: Path) -> None:
    seen: list[str] = []

    def write(rows: list[Row]) -> None:
        table.write(tmp_path, {"GPU": "none"}, rows)
        seen.append((tmp_path / "check.md").read_text())

    rows = run([part("good"), part("wrong")], "cpu", tmp_path, write, 1.0)
    assert "| good | holds | ok | on a cpu |" in seen[0]
    assert "differs" not in seen[0]
    assert "- GPU: none" in seen[1]
    assert "| wrong | differs | FAILED | 2 \\| 1 |" in seen[1]
    written = json.loads((tmp_path / "check.json").read_text())
    assert [Row(**row) for row in written["rows"]] == rows
    assert table.has_failed(rows)
    assert not table.has_failed(rows[:2])


def test_mistakes_are_one_line() -> None:
    command = [sys.executable, "-m", "tests.gpu"]
    done = subprocess.run([*command, "--only", "zerro"], cwd=REPOSITORY, capture_output=True, text=True)
    assert done.returncode == 2
    assert "--only: got zerro; allowed: parity, " in done.stderr
    assert "Traceback" not in done.stderr


@pytest.mark.slow
@pytest.mark.long("eleven parts, each in a process of its own, three of which start transformers' Trainer")
def test_the_whole_check_on_a_cpu(tmp_path: Path) -> None:
    """All parts, in a process that has neither a terminal nor this one's caches."""
    check = Popen(
        ["--device", "cpu", "--output", str(tmp_path), "--minutes", "20"],
        "tests.gpu",
        cwd=REPOSITORY,
        env={**os.environ, "OMP_NUM_THREADS": "1", "XDG_CACHE_HOME": str(tmp_path)},
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )
    [done] = finish([check], timeout=600)
    content = json.loads((tmp_path / "check.json").read_text())
    failed = [row for row in content["rows"] if row["result"] == "FAILED"]
    assert done.returncode == 0, (failed, done.stderr)
    counts = {p.name: sum(row["part"] == p.name for row in content["rows"]) for p in PARTS}
    assert counts == {
        "parity": 4 * len(FAMILIES) + 2, "attention": 6, "optimizers": 4, "scaler": 4, "zero": 5,
        "checkpoints": 2, "resume": 1, "generation": 14, "gpt2 124M": 3, "bert base": 3, "llama 1B": 3,
    }  # fmt: skip
    assert {"torch", "Python", "packages", "commit", "processor"} <= content["environment"].keys()
    print(done.stdout)  # how long each part took
    assert done.stdout.count("| zero | ZeRO 3, bf16, offloaded | ok |") == 1
