"""Every command block of the README is run, and what it shows is what comes out, numbers aside."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
from sentencepiece import SentencePieceProcessor

from tests.support.training import REPOSITORY
from tests.support.warm_program import warm_program

pytestmark = pytest.mark.slow

README = REPOSITORY / "README.md"
FENCE = re.compile(r"^```(\w+)\n(.*?)^```$", re.MULTILINE | re.DOTALL)
PATH = f"{Path(sys.executable).parent}:{os.environ['PATH']}"
NUMBER = re.compile(r"\d[\d,.:]*(e[+-]?\d+)?|nan")


def blocks() -> Iterator[tuple[str, str, str]]:
    """(language, commands, text shown after them)."""
    found = FENCE.findall(README.read_text())
    for (language, commands), following in zip(found, [*found[1:], ("", "")], strict=True):
        if language in ("sh", "python"):
            yield language, commands, following[1] if following[0] == "text" else ""


def run(
    command: list[str], folder: Path, timeout: int = 600, path: str = PATH, **environment: str
) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        command,
        cwd=folder,
        env={**os.environ, "PATH": path, "HF_HUB_OFFLINE": "1", **environment},
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        timeout=timeout,
    )


def mask(line: str) -> str:
    """The line without what changes from machine to machine: numbers and units of size and time."""
    line = NUMBER.sub("#", line)
    line = re.sub(r"# (GiB|MiB|s|min|seconds|minutes|hours|days)\b", "# UNIT", line)
    return re.sub(r"(runs|corpora|exported)/\S*", "PATH", re.sub(r"/\S*/(?=runs|corpora)", "", line)).strip()


def assert_shown(shown: str, output: str, free: tuple[str, ...] = ()) -> None:
    """Each shown line came out, in its form; lines that begin with `free` words are the model's own text."""
    came = {mask(line) for line in output.splitlines()}
    for line in shown.splitlines():
        if line.strip() in ("", "…") or line.startswith(free):
            continue
        assert mask(line) in came, f"README shows {line!r}, which is not in:\n{output}"


def test_blocks(tmp_path: Path):
    """All blocks but the first two, in one folder, in the README's order."""
    rest = [block for block in blocks() if "./launch/" not in block[1]]
    assert len(rest) >= 9
    folder = tmp_path / "work"
    folder.mkdir()
    with warm_program(tmp_path) as programs:
        for language, commands, shown in rest:
            program = [sys.executable, "-c"] if language == "python" else ["bash", "-euo", "pipefail", "-c"]
            done = run([*program, commands], folder, path=f"{programs}:{PATH}", OMP_NUM_THREADS="1")
            expected = 2 if "exits with 2" in commands else 0
            assert done.returncode == expected, f"{commands}\n{done.stdout}"
            assert_shown(shown, done.stdout, free=("The film was", "  [MASK]"))


def test_the_two_commands(tmp_path: Path):
    """The quickstart, shortened; the other command is the one that runs this test."""
    (_, quickstart, _), (_, test, shown) = [block for block in blocks() if "./launch/" in block[1]]
    assert test.split()[0] == "./launch/test.sh"
    script = quickstart.split()[0]
    # The environment of this test is set up already; pip must not run in the middle of the tests.
    overrides = ["train.steps=60", "checkpoint.every=20", "evaluation.every=60", "evaluation.max_samples=32"]
    done = run([f"{REPOSITORY}/{script}", *overrides], tmp_path, FOLDER=str(tmp_path))
    assert done.returncode == 0, done.stdout
    assert "killed (kill -9)" in done.stdout
    assert "resuming from" in done.stdout
    assert (tmp_path / "runs/quickstart/huggingface/model.safetensors").exists()
    assert (tmp_path / "runs/quickstart/loss.png").read_bytes().startswith(b"\x89PNG")
    sampling = done.stdout.partition("== Sampling\n")[2].partition("\n== ")[0]
    samples = sampling.strip().removesuffix("---").split("\n---\n")
    assert len(samples) == 3
    tokenizer = SentencePieceProcessor(model_file=str(tmp_path / "corpora/reviews/tokenizer.model"))
    assert min(len(tokenizer.encode(sample)) for sample in samples) >= 40
    losses = [float(x) for x in re.findall(r"validation loss (\d+\.\d+)", done.stdout)]
    assert losses[0] > 8.5
    assert losses[-1] < losses[0] - 1.0
    assert "unigram_loss" in shown
