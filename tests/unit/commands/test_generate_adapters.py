"""`generate` with the additions of runs, with several in turn, and without."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from llmtrain.commands import generate
from llmtrain.errors import UserError
from tests.support.training import compose

SIZE = ("model=gpt_tiny", "model.num_layers=1", "model.hidden_size=32", "model.num_heads=4")
BATCH = ("batch.global_size=4", "batch.micro_size=4", "batch.sequence_length=16", "train.steps=4")


@pytest.fixture(scope="module")
def folder(corpus: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """`base`, and runs `calm` and `bold` over it, which were trained with great steps."""
    from llmtrain.commands import train as training

    folder = tmp_path_factory.mktemp("adapters")
    common = (f"data.path={corpus}", *BATCH, "evaluation.every=null", "evaluation.at_start=false", "track=[]")
    training.run(compose((*SIZE, *common, f"run.dir={folder / 'base'}")))
    training.run(compose((*SIZE, *common, f"run.dir={folder / 'other'}", "seed=1")))
    for name, seed in (("calm", 1), ("bold", 2)):
        more = ("method=lora", "optimizer.lr=0.3", "schedule=constant", f"seed={seed}")
        path = f"model.path={folder / 'base'}"
        training.run(compose(("model=pretrained", path, *common, *more, f"run.dir={folder / name}")))
    return folder


@pytest.fixture
def said(folder: Path, capsys: pytest.CaptureFixture[str]) -> Callable[..., str]:
    def say(checkpoint: str, **keys: Any) -> str:
        capsys.readouterr()
        settings = {"temperature": 0.0, "max_new_tokens": 12}
        generate.run({"checkpoint": folder / checkpoint, "prompt": ["a"], "generate": settings, **keys})
        return capsys.readouterr().out

    return say


def test_with_and_without(said: Callable[..., str], folder: Path) -> None:
    base, calm, bold = said("base"), said("calm"), said("bold")
    assert len({base, calm, bold}) == 3
    assert said("calm", adapter=False) == base
    assert said("base", adapters={"one": folder / "calm"}) == calm
    both = said("base", adapters={"calm": folder / "calm", "bold": folder / "bold"})
    assert both == f"[calm]\n{calm}[bold]\n{bold}"


def test_refusals(said: Callable[..., str], folder: Path) -> None:
    for checkpoint, keys, told in (
        ("base", {"adapter": False}, "that was trained by lora"),
        ("base", {"adapters": {"x": folder / "other"}}, "which holds a whole model"),
        ("other", {"adapters": {"x": folder / "calm"}}, "one that was trained over"),
        ("base", {"adapter": False, "adapters": {"x": folder / "calm"}}, "false with adapters"),
    ):
        with pytest.raises(UserError) as caught:
            said(checkpoint, **keys)
        assert told in str(caught.value)
