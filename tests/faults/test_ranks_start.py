"""Ranks that do not fit together, or do not come: told before anything is trained, in a line a mistake,
by real processes that find each other as a launcher's environment says."""

from __future__ import annotations

import subprocess
from collections.abc import Mapping, Sequence
from importlib import metadata
from pathlib import Path

import pytest

from llmtrain.corpus.corpus import Corpus
from tests.support.corpora import write_text
from tests.support.training import TINY_GPT
from tests.support.warm import PRELUDE, finish, llmtrain, rank_environment, start

pytestmark = pytest.mark.slow


def start_ranks(
    commands: Sequence[Sequence[str]],
    *,
    ranks: Sequence[int] | None = None,
    size: int | None = None,
    environments: Mapping[int, Mapping[str, str]] | None = None,
    verb: str = "train",
) -> list[subprocess.CompletedProcess[str]]:
    """`llmtrain VERB COMMAND` on each rank, without any launcher; → how each ended."""
    numbers = list(range(len(commands))) if ranks is None else ranks
    shared = rank_environment(size or len(commands))
    own = environments or {}
    return finish(
        [
            start(
                verb, *command, **{**shared, "RANK": str(rank), "LOCAL_RANK": str(rank), **own.get(rank, {})}
            )
            for rank, command in zip(numbers, commands, strict=True)
        ],
        timeout=120,
    )


def errors(done: Sequence[subprocess.CompletedProcess[str]]) -> list[str]:
    """What all ranks said together; each must have ended with code 2 and without a traceback."""
    for process in done:
        assert process.returncode == 2, process.stderr
        assert "Traceback" not in process.stderr
        assert "Exception raised" not in process.stderr, "torch's own pages"
    lines = [line for process in done for line in process.stderr.splitlines()]
    return [line.removeprefix("llmtrain: error: ") for line in lines if line.startswith("llmtrain: error: ")]


def training(corpus: Path, run: Path, *overrides: str) -> list[str]:
    settings = [*TINY_GPT, "train.steps=2", "device=cpu", "evaluation.at_start=false", "data.workers=0"]
    return [*settings, f"data.path={corpus}", f"run.dir={run}", *overrides]


@pytest.fixture(scope="module")
def changed(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A corpus like the others' `corpus`, made from fewer documents."""
    folder = tmp_path_factory.mktemp("changed")
    source = write_text(folder / "text.jsonl", num_documents=300)
    sizes = ["tokenizer.vocab_size=320", "split.validation=0.1", "split.test=0.05", "workers=1"]
    done = llmtrain("prepare", f"source={source}", f"output={folder}/prepared", *sizes)
    assert done.returncode == 0, done.stderr
    return folder / "prepared"


def test_one_rank_has_another_learning_rate_one_other_data_and_one_another_torch(
    corpus: Path, changed: Path, tmp_path: Path
):
    """The data lie at a path of each host's own, as a link here; the third host was not updated."""
    commands = []
    for rank in range(4):
        (tmp_path / "corpora").mkdir(exist_ok=True)
        path = tmp_path / "corpora" / f"of host {rank}"
        path.symlink_to(changed if rank == 2 else corpus)
        commands.append(training(path, tmp_path / "run"))
    commands[1].append("optimizer.lr=0.01")
    prelude = tmp_path / "other_torch.py"
    prelude.write_text(
        "from importlib import metadata\n"
        "real = metadata.version\n"
        "metadata.version = lambda name: '2.12.1' if name == 'torch' else real(name)\n"
    )
    told = errors(start_ranks(commands, environments={3: {PRELUDE: str(prelude)}}))
    own, others = (Corpus.open(path).manifest.fingerprint for path in (changed, corpus))
    torch = metadata.version("torch")
    assert told == [
        "rank 1: optimizer.lr: got 0.01, the other 3 ranks have 0.0003; "
        "start all ranks with the same command",
        f"rank 2: content of data.path: got {own}, the other 3 ranks have {others}; "
        "copy the same corpus to all hosts",
        f"rank 3: version of torch: got 2.12.1, the other 3 ranks have {torch}; "
        "install the same version on all hosts",
    ]
    assert not (tmp_path / "run").exists()


def test_half_the_ranks_differ_from_rank_0(corpus: Path, tmp_path: Path):
    """In several keys, one of them of a layout that each half finds good in itself."""
    command = training(corpus, tmp_path / "run")
    other = [*training(corpus, tmp_path / "other"), "parallel.zero=1", "seed=1"]
    told = errors(start_ranks([command, other]))
    assert [line.partition(": got ")[0] for line in told] == [
        "rank 1: run.dir",
        "rank 1: parallel.zero",
        "rank 1: engine",
        "rank 1: seed",
    ]
    assert f"got {tmp_path}/other, the other rank has {tmp_path}/run" in told[0]
    assert not (tmp_path / "run").exists()
    assert not (tmp_path / "other").exists()


def test_other_digits_on_one_rank(tmp_path: Path):
    files = []
    for name, brightness in (("a.csv", 0), ("b.csv", 1)):
        rows = (
            ",".join([str((i * j + brightness) % 256) for j in range(784)] + [str(i % 10)]) for i in range(99)
        )
        files.append(tmp_path / name)
        files[-1].write_text("\n".join(rows) + "\n")
    common = ["experiment=mnist_cnn", "batch.micro_size=32", "device=cpu", f"run.dir={tmp_path}/run"]
    told = errors(start_ranks([[*common, f"data.path={file}"] for file in files]))
    assert len(told) == 1
    assert told[0].startswith("rank 1: content of data.path: got ")


def test_ranks_that_never_come_are_named(corpus: Path, tmp_path: Path):
    """Rank 1 is not started; rank 3 makes a mistake of its own before it could meet the others."""
    good, bad = (training(path, tmp_path / "run") for path in (corpus, tmp_path / "nowhere"))
    patience = {rank: {"START_TIMEOUT": "5"} for rank in (0, 2)}
    told = errors(start_ranks([good, good, bad], ranks=[0, 2, 3], size=4, environments=patience))
    assert told == [
        "start: got 2 of 4 ranks within 5 s, not ranks 1, 3; "
        "see the messages of the missing ranks, or wait longer with START_TIMEOUT=seconds",
        f"rank 3: {tmp_path}/nowhere: got no such folder; allowed: a corpus; "
        "make one with: llmtrain prepare source=… output=…",
    ]


def test_rank_0_never_comes(corpus: Path, tmp_path: Path):
    command = training(corpus, tmp_path / "run")
    told = errors(start_ranks([command], ranks=[1], size=2, environments={1: {"START_TIMEOUT": "1"}}))
    assert len(told) == 1
    assert told[0].startswith("start: got no answer from rank 0 at 127.0.0.1:")


def test_evaluation_of_different_checkpoints(corpus: Path, tmp_path: Path):
    """A run that still trains may have a newer checkpoint for the rank that looks last."""
    done = llmtrain("train", *training(corpus, tmp_path, "checkpoint.every=1", "checkpoint.keep_last=2"))
    assert done.returncode == 0, done.stderr
    common = [f"data.path={corpus}", "parallel.tensor=2", "device=cpu", "data.workers=0"]
    steps = [tmp_path / "checkpoints" / f"step-0000000{step}" for step in (1, 2)]
    found = errors(start_ranks([[f"checkpoint={step}", *common] for step in steps], verb="evaluate"))
    assert any("step of the checkpoint: got 2" in line for line in found), found
    (line,) = errors(start_ranks([["checkpoint=" + str(tmp_path)]] * 2, verb="generate"))[:1]
    assert "parallel: got 'tensor 1 · pipeline 1 = 1'" in line or "parallel: got tensor 1" in line
    assert "parallel.tensor=2" in line
