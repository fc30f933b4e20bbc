"""A family of models outside the package: its entry point, its presets, and every verb on it."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
from safetensors.torch import load_file

from llmtrain.cli.main import run_verb
from llmtrain.models.registry import families
from tests.support.training import REPOSITORY
from tests.support.warm import PRELUDE, llmtrain, on_ranks

TOY = REPOSITORY / "tests/support/toy_distribution"
"""What pip would install: a package and its entry point."""


NO_PRESETS = """
from dataclasses import dataclass
from pathlib import Path
from llmtrain.models.family import Family

@dataclass(frozen=True)
class Config:
    family: str = "broken"

FAMILY = Family(Config, "decoder", None, None, presets=Path("/nowhere/conf"))
"""


PLAN = ("plan", "model=toy,gpt_tiny", "model.vocab_size=100", "--multirun")


@pytest.fixture
def installed(tmp_path: Path) -> dict[str, str]:
    """The environment of warm processes in which the toy family is installed."""
    prelude = tmp_path / "install.py"
    prelude.write_text(f"import sys\nsys.path.insert(0, {str(TOY)!r})\n")
    return {PRELUDE: str(prelude)}


@pytest.mark.slow
def test_it_is_trained_evaluated_exported_and_imported(
    corpus: Path, tmp_path: Path, installed: dict[str, str]
):
    def told(*arguments: object) -> str:
        done = llmtrain(*map(str, arguments), **installed)
        assert done.returncode == 0, done.stderr
        return done.stdout + done.stderr

    run, folder, imported = (tmp_path / name for name in ("run", "folder", "imported"))
    words = ["model=toy", f"data.path={corpus}", f"run.dir={run}", "model.hidden_size=24"]
    words += ["batch.global_size=8", "batch.micro_size=2", "batch.sequence_length=32", "train.steps=4"]
    for done in on_ranks(2, "train", *words, **installed):
        assert done.returncode == 0, done.stderr
    assert "perplexity" in told("evaluate", f"checkpoint={run}", f"data.path={corpus}")
    assert "the" in told("generate", f"checkpoint={run}", "prompt=the", "generate.max_new_tokens=3")
    told("export", f"checkpoint={run}", f"output={folder}")
    assert f"imported toy, {320 * 24 + 24 * 24:,} parameters" in told(
        "import", f"source={folder}", f"output={imported}"
    )
    compared = llmtrain("checkpoint", "diff", str(run), str(imported), **installed)
    assert "2 tensors compared, 0 differ" in compared.stdout
    assert {
        name: tuple(tensor.shape) for name, tensor in load_file(folder / "model.safetensors").items()
    } == {
        "toy.embedding.weight": (320, 24),
        "toy.mix.weight": (24, 24),
    }
    assert json.loads((folder / "config.json").read_text())["model_type"] == "toy"


@pytest.mark.slow
def test_its_presets_stand_beside_those_of_the_package(installed: dict[str, str]):
    done = subprocess.run(
        [sys.executable, "-m", "llmtrain", *PLAN],
        env={**os.environ, "PYTHONPATH": str(TOY), "OMP_NUM_THREADS": "1"},
        cwd=REPOSITORY,
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
    assert f"toy, {100 * 32 + 32 * 32:,} parameters" in done.stdout
    assert "gpt, " in done.stdout
    helped = llmtrain("train", "--help", **installed)
    assert "toy" in next(line for line in helped.stdout.splitlines() if line.startswith("model:"))
    refused = llmtrain("plan", "model=toi", **installed)
    assert refused.returncode == 2
    assert "toy" in refused.stderr
    assert len(refused.stderr.splitlines()) == 1


BROKEN = {
    "import missing_library": "ModuleNotFoundError: No module named 'missing_library'; allowed: an",
    "FAMILY = 3": "got int; allowed: a Family with another name than gpt",
    "from llmtrain.models.gpt import FAMILIES; FAMILY = FAMILIES[0]": "got family gpt; allowed: a Family",
    NO_PRESETS: "got presets=/nowhere/conf; allowed: a folder with model/NAME.yaml",
}


@pytest.mark.parametrize("source", BROKEN)
def test_a_broken_family_is_one_line(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], source: str
):
    (tmp_path / "broken_family.py").write_text(source)
    metadata = tmp_path / "broken_family-1.0.dist-info"
    metadata.mkdir()
    (metadata / "METADATA").write_text("Metadata-Version: 2.1\nName: broken-family\nVersion: 1.0\n")
    (metadata / "entry_points.txt").write_text("[llmtrain.families]\nbroken = broken_family:FAMILY\n")
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.delitem(sys.modules, "broken_family", raising=False)
    families.cache_clear()
    try:
        assert run_verb("plan", ["model=gpt_tiny"]) == 2
    finally:
        families.cache_clear()
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith("llmtrain: error: entry point broken_family:FAMILY: got ")
    assert BROKEN[source] in line
    assert "uninstall its package" in line
