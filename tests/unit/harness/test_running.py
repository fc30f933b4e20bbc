"""Tasks are done without a trace in the process, and what any rank meets ends the work on all."""

from __future__ import annotations

import os
import random
import sys
from collections.abc import Callable
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from llmtrain.distributed.stop_checks import StoppedError
from llmtrain.harness.codec import Codec
from llmtrain.harness.running import run_tasks
from llmtrain.harness.tasks import load_tasks
from llmtrain.harness.team import Team
from llmtrain.interchange.huggingface import export_folder
from llmtrain.interchange.trained import load_trained
from llmtrain.models.gpt.config import GPTConfig
from llmtrain.models.gpt.model import GPT
from llmtrain.nn.initialize import initialize
from llmtrain.parallel.layout import Layout
from llmtrain.parallel.mesh import Mesh
from tests.support import warm
from tests.support.harness_tasks import write_tasks

ALONE = Layout(1, 1, 1, 1, 1, 0, 1, 1, 1, 64)


@pytest.fixture(scope="module")
def tasks(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_tasks(tmp_path_factory.mktemp("tasks"), documents=6)


def export(path: Path, corpus: Path, weight: float = 1.0) -> Path:
    """A model whose last norm has this weight."""
    model = GPT(GPTConfig(vocab_size=320, hidden_size=16, num_layers=1, num_heads=2, max_sequence_length=64))
    initialize(model, seed=0)
    with torch.no_grad():
        model.norm.weight.fill_(weight)
    export_folder(model.config, dict(model.named_parameters()), corpus / "tokenizer.model", path)
    return path


def run(model: Path, tasks: Path, between: Callable[[], None]) -> Any:
    from llmtrain.harness.model import HarnessModel

    trained = load_trained(model)
    codec = Codec(trained.tokenizer())
    team = Team(
        trained.build(torch.device("cpu")),
        codec,
        Mesh(ALONE),
        batch_tokens=64,
        low_precision=nullcontext(),
        between=between,
    )
    loaded = load_tasks(["choice", "writing"], tasks, None)
    return run_tasks(team, lambda: HarnessModel.of(team, codec, trained), loaded, limit=None)


def drawn() -> tuple[float, float, float]:
    """The next number of each generator."""
    return random.random(), float(np.random.rand()), float(torch.rand(()))


def seed() -> None:
    random.seed(3)
    np.random.seed(3)
    torch.manual_seed(3)


@pytest.mark.parametrize("stops", [False, True])
def test_generators_and_streams_are_as_before(
    stops: bool, corpus: Path, tasks: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    calls: list[int] = []

    def between() -> None:
        calls.append(len(calls))
        random.random()  # as a task may
        if stops and len(calls) == 3:
            raise StoppedError

    model = export(tmp_path / "model", corpus)
    seed()
    expected = drawn()
    seed()
    stdout = sys.stdout
    with pytest.raises(StoppedError) if stops else nullcontext():
        assert set(run(model, tasks, between)["results"]) == {"choice", "writing"}
    assert drawn() == expected
    assert sys.stdout is stdout
    assert "DISABLE_MULTIPROC" not in os.environ
    assert len(calls) == 3 if stops else len(calls) > 3


@pytest.mark.slow
@pytest.mark.parametrize(
    ("weight", "task", "words"),
    [
        (3e38, "choice", "model: got logits that are not finite"),
        (1.0, "failing", "tasks: got a task that fails"),
    ],
)
def test_what_one_rank_meets_ends_all(
    weight: float, task: str, words: str, corpus: Path, tasks: Path, tmp_path: Path
):
    """Each with exit code 2, and one line by all together."""
    (tasks / "failing.py").write_text("def fail(doc, results):\n    raise ValueError('no figures here')\n")
    failing = (tasks / "choice.yaml").read_text().replace("task: choice", "task: failing")
    (tasks / "failing.yaml").write_text(failing + "process_results: !function failing.fail\n")
    model = export(tmp_path / "model", corpus, weight)
    arguments = [f"checkpoint={model}", "suite=lm_eval", f"tasks=[{task}]", f"tasks_path={tasks}"]
    done = warm.on_ranks(2, "evaluate", *arguments, "batch_tokens=32", HF_HUB_OFFLINE="1", timeout=120)
    assert [each.returncode for each in done] == [2, 2], done[0].stderr
    lines = [line for each in done for line in each.stderr.splitlines() if "error" in line]
    assert len(lines) == 1, lines
    assert words in lines[0]
