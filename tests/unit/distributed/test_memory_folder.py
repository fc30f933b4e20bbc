"""The folder of a launcher for copies in memory: its own while it lives, gone then, however it ended."""

from __future__ import annotations

import os
import subprocess
import sys
import time
from pathlib import Path

import pytest

from llmtrain.distributed.memory_folder import MEMORY, empty, memory_folder
from llmtrain.errors import ConfigError

KILLED = """
import os, sys
from pathlib import Path
from llmtrain.distributed.memory_folder import memory_folder
with memory_folder(Path(sys.argv[1]), Path("run")) as folder:
    (folder / "step-00000010").mkdir()
    os._exit(9)
"""


def test_what_a_killed_launcher_left_is_removed_and_nothing_else(tmp_path: Path) -> None:
    assert subprocess.run([sys.executable, "-c", KILLED, str(tmp_path)]).returncode == 9
    [left] = tmp_path.iterdir()
    assert (left / "step-00000010").is_dir()
    with memory_folder(tmp_path, Path("other")) as other:
        assert left.exists(), "another run's"
        with memory_folder(tmp_path, Path("run")) as first:
            assert first is not None
            assert not left.exists()
            assert (first.stat().st_mode & 0o777, os.environ[MEMORY]) == (0o700, str(first))
            with memory_folder(tmp_path, Path("run")) as second:
                assert sorted(tmp_path.iterdir()) == sorted(filter(None, (other, first, second)))
                (first / "step-00000010").mkdir()
                empty(first)
                assert [path.name for path in first.iterdir()] == [".launcher"]
            os.environ[MEMORY] = str(first)
        os.environ[MEMORY] = str(other)
    assert not list(tmp_path.iterdir())
    assert MEMORY not in os.environ


def test_a_folder_that_was_just_made_is_let_be(tmp_path: Path) -> None:
    with memory_folder(tmp_path, Path("run")) as folder:
        assert folder is not None
        (folder / ".launcher").unlink()  # as before its launcher has locked it
        with memory_folder(tmp_path, Path("run")):
            assert folder.exists()
        os.environ[MEMORY] = str(folder)
        old = time.time() - 3600
        os.utime(folder, (old, old))
        with memory_folder(tmp_path, Path("run")):
            assert not folder.exists()


def test_a_place_that_cannot_be_written(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with (
        pytest.raises(ConfigError, match=r"^checkpoint.memory.dir: got .*/file, where no folder can be made"),
        memory_folder(tmp_path / "file", Path("run")),
    ):
        pass
