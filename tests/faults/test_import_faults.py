"""An import that is killed at any moment leaves no checkpoint or a whole one; the same command mends it. What
is no file ends it in a line."""

from __future__ import annotations

import multiprocessing
import os
import signal
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch

from llmtrain.checkpoint.reader import Checkpoint
from llmtrain.checkpoint.retention import find
from llmtrain.commands import import_
from llmtrain.errors import CheckpointError
from llmtrain.interchange.huggingface import export_folder
from llmtrain.models.gpt.config import GPTConfig
from llmtrain.models.gpt.model import GPT
from tests.support.warm import llmtrain

pytestmark = pytest.mark.slow

CONFIG = GPTConfig(vocab_size=64, hidden_size=16, num_layers=1, num_heads=2, max_sequence_length=16)
DURABLE = ("write", "fsync", "replace", "rename")
"""What changes the disk; a kill comes before the n-th call of any."""


def _killed_at(n: int, settings: dict[str, Any]) -> None:
    """In a process of its own: import, and die before the n-th call."""
    calls = 0

    def counted(call: Any) -> Any:
        def wrapper(*arguments: Any, **keywords: Any) -> Any:
            nonlocal calls
            calls += 1
            if calls == n:
                os.kill(os.getpid(), signal.SIGKILL)
            return call(*arguments, **keywords)

        return wrapper

    for name in DURABLE:
        setattr(os, name, counted(getattr(os, name)))
    import_.run(settings)


def _both_at_every_moment(cases: dict[bool, dict[str, Any]], results: Any) -> None:
    torch.set_num_threads(1)
    for overwrite, settings in cases.items():
        # Once before, so that no child has to import modules.
        import_.run({**settings, "output": settings["output"] + "-before", "overwrite": False})
        for outcome in _at_every_moment(settings):
            results.put((overwrite, outcome))
    results.put(None)


def _at_every_moment(settings: dict[str, Any]) -> Iterator[tuple[bool, int, str]]:
    """Kill an import before its first call, its second, …, until one ends by itself; yield what each left."""
    n = 0
    while True:
        n += 1
        child = os.fork()
        if child == 0:
            with open(os.devnull, "w") as null:
                os.dup2(null.fileno(), 2)
            _killed_at(n, settings)
            os._exit(0)
        _, status = os.waitpid(child, 0)
        try:
            found = find(Path(settings["output"]), lambda text: None)
            left = "damaged" if found.incompleteness() else "whole"
        except CheckpointError as error:
            left = (
                "nothing" if "no checkpoint" in str(error) or "no such folder" in str(error) else str(error)
            )
        yield os.WIFSIGNALED(status), os.waitstatus_to_exitcode(status), left
        if not os.WIFSIGNALED(status):
            return


@dataclass
class Killed:
    """A folder into which imports were killed, one after the other."""

    output: Path
    embedding: torch.Tensor
    """What the imported folder holds."""
    seen: list[tuple[bool, int, str]]
    """Of each import: whether it was killed, its exit code, what it left."""


@pytest.fixture(scope="module")
def killed(tmp_path_factory: pytest.TempPathFactory) -> dict[bool, Killed]:
    """Whether there was an earlier import, to be replaced → the imports; all in one process, whose start
    takes longer than they do."""
    folder = tmp_path_factory.mktemp("killed")
    tensors = {name: torch.randn(p.shape) for name, p in GPT(CONFIG).named_parameters()}
    export_folder(CONFIG, tensors, None, folder / "theirs")
    cases = {
        overwrite: {
            "source": str(folder / "theirs"),
            "output": str(folder / f"ours-{overwrite}"),
            "overwrite": overwrite,
        }
        for overwrite in (False, True)
    }
    import_.run(cases[True])
    context = multiprocessing.get_context("spawn")
    results: Any = context.Queue()
    process = context.Process(target=_both_at_every_moment, args=(cases, results))
    process.start()
    found = {
        overwrite: Killed(Path(str(settings["output"])), tensors["embedding.weight"], [])
        for overwrite, settings in cases.items()
    }
    while (result := results.get(timeout=120)) is not None:
        overwrite, outcome = result
        found[overwrite].seen.append(outcome)
    process.join()
    return found


@pytest.mark.parametrize("overwrite", [False, True])
def test_killed_at_every_moment(overwrite: bool, killed: dict[bool, Killed]) -> None:
    output, seen = killed[overwrite].output, killed[overwrite].seen
    assert len(seen) > 5
    outcomes = [left for _, _, left in seen]
    assert set(outcomes) <= {"nothing", "whole"}
    assert outcomes[-1] == "whole"
    assert "nothing" in outcomes, "killed between the two names"
    if overwrite:
        assert outcomes[0] == "whole", "the earlier import"
        assert seen[-1][1] == 0
    checkpoint: Checkpoint = find(output, print)
    assert torch.equal(checkpoint.weights()["embedding.weight"], killed[overwrite].embedding)
    (found,) = (output / "checkpoints").iterdir()
    assert found.name == "step-00000000"


def test_a_pipe_in_place_of_a_file_ends_the_command_in_one_line(tmp_path: Path) -> None:
    tensors = {name: torch.zeros(p.shape) for name, p in GPT(CONFIG).named_parameters()}
    export_folder(CONFIG, tensors, None, tmp_path / "theirs")
    (tmp_path / "theirs" / "config.json").unlink()
    os.mkfifo(tmp_path / "theirs" / "config.json")
    settings = [f"source={tmp_path / 'theirs'}", f"output={tmp_path / 'ours'}"]
    done = llmtrain("import", *settings, timeout=120)
    assert done.returncode == 2
    (line,) = done.stderr.strip().split("\n")
    assert "config.json: got a pipe, not a file; allowed: a Hugging Face model folder holds this file" in line
