"""What tests of `llmtrain data` share."""

from __future__ import annotations

import pytest

from llmtrain.cli import main as cli
from tests.support.training import TINY_GPT
from tests.support.warm import llmtrain

SETTINGS = (*TINY_GPT, "device=cpu", "data.workers=0", "evaluation.every=null", "evaluation.at_start=false")


def train(*arguments: str) -> None:
    done = llmtrain("train", *SETTINGS, *arguments)
    assert done.returncode == 0, done.stderr


def call(capsys: pytest.CaptureFixture[str], *arguments: object) -> tuple[int, list[str], list[str]]:
    """Exit code, lines on standard output, problems."""
    code = cli.run_verb("data", [str(argument) for argument in arguments])
    captured = capsys.readouterr()
    assert "Traceback" not in captured.err
    problems = [line for line in captured.err.splitlines() if line.startswith("llmtrain: error: ")]
    return code, captured.out.splitlines(), problems
