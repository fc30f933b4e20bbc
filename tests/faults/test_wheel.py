"""A wheel built from the repository trains from any folder, with the conf/ and launch/ that it carries."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from tests.support.training import REPOSITORY, TINY_GPT

pytestmark = pytest.mark.slow

NOT_SOURCES = shutil.ignore_patterns(".*", "build", "*.egg-info", "__pycache__", "runs", "corpora", "outputs")


def call(*arguments: str, folder: Path, **environment: str) -> subprocess.CompletedProcess[str]:
    done = subprocess.run(
        [sys.executable, *arguments],
        capture_output=True,
        text=True,
        cwd=folder,
        env={**os.environ, "OMP_NUM_THREADS": "1", **environment},
        timeout=300,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    return done


@pytest.fixture(scope="module")
def installed(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder that holds the installed wheel, made without a network."""
    folder = tmp_path_factory.mktemp("wheel")
    # A build leaves build/ and *.egg-info beside its sources.
    sources = Path(shutil.copytree(REPOSITORY, folder / "sources", ignore=NOT_SOURCES))
    pip = ("-m", "pip", "--disable-pip-version-check")
    call(*pip, "wheel", "--no-deps", "--no-build-isolation", "-w", str(folder), str(sources), folder=folder)
    (wheel,) = folder.glob("llmtrain-*.whl")
    call(*pip, "install", "--no-deps", "--target", str(folder / "site"), str(wheel), folder=folder)
    shutil.rmtree(sources)
    return folder / "site"


def content(folder: Path) -> dict[str, bytes]:
    """File below the folder → its bytes; pages are for readers of the checkout."""
    return {
        str(path.relative_to(folder)): path.read_bytes()
        for path in sorted(folder.rglob("*"))
        if path.is_file() and "__pycache__" not in path.parts and path.suffix != ".md"
    }


def test_conf_launch_and_every_module_came_along(installed: Path):
    for name in ("conf", "launch"):
        assert content(installed / "llmtrain" / name) == content(REPOSITORY / name)
        assert not list((installed / "llmtrain" / name).glob("*.md"))
    ours = {name for name in content(REPOSITORY / "llmtrain") if name.endswith(".py")}
    assert ours <= set(content(installed / "llmtrain"))


def test_it_trains_from_another_folder(installed: Path, corpus: Path, tmp_path: Path):
    where = call(
        "-c", "import llmtrain; print(llmtrain.__file__)", folder=tmp_path, PYTHONPATH=str(installed)
    ).stdout
    assert Path(where.strip()) == installed / "llmtrain" / "__init__.py"
    call(
        "-m",
        "llmtrain",
        "train",
        *TINY_GPT,
        "train.steps=3",
        "evaluation.max_samples=16",
        f"data.path={corpus}",
        "run.dir=run",
        folder=tmp_path,
        PYTHONPATH=str(installed),
    )
    assert (tmp_path / "run" / "checkpoints" / "step-00000003" / "manifest.json").exists()
