"""Standard output and error that are closed, full, or read by nobody any more."""

from __future__ import annotations

import os
import pty
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest

from llmtrain.cli.verbs import DOES_MORE_THAN_PRINT, SECOND_VERBS, VERBS
from llmtrain.standard_streams import PIPE_CLOSED, OutputLost, _Stream
from tests.support.training import REPOSITORY, TINY_GPT
from tests.support.warm import PRELUDE, TORCHRUN, Popen, finish

PRINTING = (["--help"], ["checkpoint", "--help"], ["train", "--help"], ["train", "--cfg", "job"], ["plan"])
GONE = ("closed", "left", "full", "terminal")
FULL = "llmtrain: error: standard output: got No space left on device; redirect it to a writable location\n"


CLOSED = """
import os, sys

for number, name in {closed}:
    os.close(number)
    setattr(sys, name, None)
    setattr(sys, f"__{{name}}__", None)
"""
"""What a warm process does to be as an interpreter that starts with these streams closed."""


def run(
    arguments: Sequence[str],
    folder: Path,
    *,
    output: str = "kept",
    error: str = "kept",
    program: str = "llmtrain",
    is_cold: bool = False,
) -> tuple[int, str]:
    """`python -m PROGRAM ARGUMENTS` → exit code, and what it says on standard error where that is kept."""
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    streams = ((1, "stdout", output), (2, "stderr", error))
    closed = [(number, name) for number, name, how in streams if how == "closed"]
    ends = (_end(output), _end(error))
    options: dict[str, Any] = {"stdout": ends[0], "stderr": ends[1], "cwd": REPOSITORY, "text": True}
    if is_cold:
        closing = "".join(f" {number}>&-" for number, _ in closed)
        command = ["sh", "-c", f'exec "$0" "$@"{closing}', sys.executable, "-m", program, *arguments]
        process = subprocess.Popen(command, env=environment, **options)
    else:
        if closed:
            environment[PRELUDE] = str(folder / "closed.py")
            Path(environment[PRELUDE]).write_text(CLOSED.format(closed=closed))
        process = Popen(arguments, program, env=environment, **options)
    for end in ends:
        if end != subprocess.PIPE:
            os.close(end)
    [done] = finish([process])
    return done.returncode, done.stderr or ""


def _end(how: str) -> int:
    if how == "left":
        reader, writer = os.pipe()
        os.close(reader)
        return writer
    if how == "terminal":
        master, slave = pty.openpty()
        os.close(master)
        return slave
    return os.open("/dev/full", os.O_WRONLY) if how == "full" else subprocess.PIPE


@pytest.mark.parametrize("arguments", PRINTING, ids=" ".join)
def test_what_only_prints_ends_where_it_cannot(arguments: list[str], tmp_path: Path):
    assert run(arguments, tmp_path, output="left") == (PIPE_CLOSED, "")
    assert run(arguments, tmp_path, output="full") == (2, FULL)
    is_cold = arguments == ["plan"]
    assert run(arguments, tmp_path, output="closed", error="closed", is_cold=is_cold) == (0, "")


def test_mistakes_keep_their_exit_code(tmp_path: Path):
    assert run(["plann"], tmp_path, output="full", error="full") == (2, "")
    assert run(["plan", "seed=x"], tmp_path, output="closed", error="closed") == (2, "")


@pytest.mark.parametrize("how", ["closed", "left"])
def test_training_goes_on_without_output(how: str, corpus: Path, tmp_path: Path):
    settings = [*TINY_GPT, f"data.path={corpus}", f"run.dir={tmp_path / 'run'}", "device=cpu"]
    settings += ["train.steps=2", "train.log_every=1", "evaluation.every=null", "evaluation.at_start=false"]
    assert run(["train", *settings], tmp_path, output=how, error=how, is_cold=how == "closed") == (0, "")
    assert (tmp_path / "run/checkpoints/step-00000002").is_dir()


@pytest.mark.parametrize("how", GONE)
def test_preparing_goes_on_without_output(how: str, tmp_path: Path):
    source, output = tmp_path / "a.txt", tmp_path / "corpus"
    source.write_text("\n\n".join(f"{number} and some words" * 20 for number in range(300)))
    settings = [f"source={source}", f"output={output}", "tokenizer.vocab_size=280", "workers=1"]
    assert run(["prepare", *settings], tmp_path, output=how) == (0, "")
    assert (output / "manifest.json").exists()


@pytest.mark.slow
@pytest.mark.parametrize("how", ["closed", "left"])
def test_a_launcher_goes_on_without_output(how: str, corpus: Path, tmp_path: Path):
    settings = [*TINY_GPT, f"data.path={corpus}", f"run.dir={tmp_path / 'run'}", "device=cpu"]
    settings += ["train.steps=2", "evaluation.every=null", "evaluation.at_start=false"]
    assert run(settings, tmp_path, output=how, error=how, program=TORCHRUN) == (0, "")
    assert (tmp_path / "run/checkpoints/step-00000002").is_dir()


def test_only_a_needed_stream_says_that_it_is_lost():
    with _broken() as stream:
        assert stream.write(b"lost") == 4
    with _broken() as stream:
        stream.is_needed = True
        with pytest.raises(OutputLost) as caught:
            stream.write(b"lost")
        assert (caught.value.exit_code, caught.value.problems) == (PIPE_CLOSED, ())
        assert stream.write(b"nowhere") == 7


def _broken() -> _Stream:
    reader, writer = os.pipe()
    os.close(reader)
    return _Stream(writer, "w")


def test_a_stream_waits_where_another_program_made_it_non_blocking():
    reader, writer = os.pipe()
    os.set_blocking(writer, False)
    read = subprocess.Popen(["sh", "-c", "sleep 0.2; wc -c"], stdin=reader, stdout=subprocess.PIPE)
    os.close(reader)
    with _Stream(writer, "w") as stream:
        text = b"x" * 300_000
        while text:
            text = text[stream.write(text) :]
    assert int(read.communicate(timeout=60)[0]) == 300_000


PRINTS = """
import sys
from rich.console import Console
from llmtrain import standard_streams
standard_streams.replace_streams()
print("a\\x1b]0;title\\x07\\x1b[31mred\\x9b2J\\r\\tb  \\u3000c")
print("\\x1b[31mred\\x1b[0m \\x1b[2J 5 %\\r", file=sys.stderr)
standard_streams.print_note("done\\r\\x1b[8m https://u:S@h/x?sig=S\\nmore")
standard_streams.print_text("\\x1b[31m of a model")
Console(file=standard_streams.unescaped(sys.stdout), force_terminal=True).print("[bold]live")
"""


def test_nothing_steers_the_terminal_but_what_is_to():
    done = subprocess.run([sys.executable, "-c", PRINTS], capture_output=True, cwd=REPOSITORY, timeout=300)
    first, asked, live = done.stdout.decode().split("\n")[:3]
    assert first == r"a\x1b]0;title\x07\x1b[31mred\x9b2J\r" + "\tb  \u3000c"
    assert asked == "\x1b[31m of a model"
    assert live.startswith("\x1b[1mlive")
    assert done.stderr.decode() == "\x1b[31mred\x1b[0m \\x1b[2J 5 %\r\ndone\\r\\x1b[8m https://h/x\nmore\n"


def test_a_terminal_is_not_steered_by_generated_text():
    master, slave = pty.openpty()
    subprocess.run([sys.executable, "-c", PRINTS], stdout=slave, cwd=REPOSITORY, timeout=300)
    os.close(slave)
    assert rb"\x1b[31m of a model" in os.read(master, 10_000)
    os.close(master)


def test_the_verbs_whose_work_goes_on():
    verbs = {*VERBS, *(f"{verb}_{second}" for verb in SECOND_VERBS for second in SECOND_VERBS[verb])}
    assert verbs > DOES_MORE_THAN_PRINT
