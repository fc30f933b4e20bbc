"""Training that starts from an imported model is the same under every layout."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest

from llmtrain.commands import import_
from tests.parity.architectures import ARCHITECTURES
from tests.parity.matrix import TOLERANCES, deviation
from tests.support.training import Trace, train

pytestmark = pytest.mark.slow

STEPS = 3
LAYOUTS = {
    "tensor": ("parallel.tensor=2",),
    "pipeline": ("parallel.pipeline=2", "parallel.zero=1"),
    "zero-3": ("parallel.zero=3",),
}


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """A Qwen 3 as transformers saved it, and its import."""
    folder = tmp_path_factory.mktemp("qwen3")
    (architecture,) = (a for a in ARCHITECTURES if a.name == "qwen3")
    settings = {**architecture.settings, "vocab_size": 512}
    replace(architecture, settings=settings).theirs().save_pretrained(folder / "theirs")
    import_.run({"source": str(folder / "theirs"), "output": str(folder / "imported")})
    return {"theirs": folder / "theirs", "imported": folder / "imported"}


def overrides(corpus: Path, folder: Path) -> tuple[str, ...]:
    return (
        "model=pretrained",
        f"model.path={folder}",
        f"data.path={corpus}",
        "batch.global_size=8",
        "batch.micro_size=2",
        "batch.sequence_length=32",
        "model.dropout=0.1",
        "train.steps=20",
        "optimizer.lr=3e-3",
    )


@pytest.fixture(scope="module")
def one_process(corpus: Path, folders: dict[str, Path]) -> Trace:
    return train(1, overrides(corpus, folders["imported"]), STEPS)[0]


@pytest.mark.parametrize(
    ("layout", "kind"),
    [("tensor", "imported"), ("pipeline", "imported"), ("zero-3", "imported"), ("tensor", "theirs")],
)
def test_layouts(layout: str, kind: str, corpus: Path, folders: dict[str, Path], one_process: Trace) -> None:
    for trace in train(2, (*overrides(corpus, folders[kind]), *LAYOUTS[layout]), STEPS):
        found = deviation(trace, one_process)
        assert found.within(TOLERANCES["fp32"]), found
