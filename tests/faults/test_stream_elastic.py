"""What a run consumed is one stream, however many ranks and threads read it and whatever killed them: the
hash over its digests and the documents that its trace names say so."""

from __future__ import annotations

import json
import random
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest

from tests.faults.test_train_faults import metrics, wait_for_step
from tests.support.corpora import random_documents, write_corpus
from tests.support.warm import finish, llmtrain, on_ranks, rank_environment, start, start_ranks

pytestmark = pytest.mark.slow

STEPS = 60
FEWER_STEPS = 36
"""Still several epochs of each corpus."""
MODEL = ("model=gpt_tiny", "model.num_layers=1", "model.hidden_size=16", "model.num_heads=2", "seed=5")
SETTINGS = (*MODEL, "device=cpu", "batch.global_size=24", "batch.sequence_length=32")
NO_EVALUATION = ("evaluation.every=null", "evaluation.at_start=false", "checkpoint.every=4")
MIXTURE = "data.mixture={web: 0.5, books: 0.3, code: 0.2}"
ORDER = ("data.shuffle_tars=2", "data.packing=best_fit", "data.overlap=4")


@pytest.fixture(scope="module")
def corpora(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder of three corpora of 8, 6 and 4 shards of some ten sequences: a run of STEPS steps goes
    through each several times."""
    folder = tmp_path_factory.mktemp("corpora")
    for seed, (name, shards) in enumerate({"web": 8, "books": 6, "code": 4}.items()):
        documents = random_documents(15 * shards, seed, longest=50)
        write_corpus(folder / name, {"train": documents})
    return folder


def arguments(data: Path | str, run: Path, *overrides: str, steps: int = STEPS, micro: int = 12) -> list[str]:
    """micro: samples of a micro-batch."""
    return [
        "train",
        *SETTINGS,
        *NO_EVALUATION,
        f"batch.micro_size={micro}",
        f"data.path={data}",
        f"run.dir={run}",
        f"train.steps={steps}",
        *overrides,
    ]


def train(processes: int, command: list[str]) -> str:
    """What rank 0 said."""
    ranks = on_ranks(processes, *command)
    for done in ranks:
        assert done.returncode == 0, done.stderr[-3000:]
    return ranks[0].stderr


def consumed(run: Path, steps: int = STEPS) -> str:
    """The hash over what the run's steps consumed."""
    done = llmtrain("data", "digest", str(run), f"steps={steps}")
    assert done.returncode == 0, done.stderr
    told, words = done.stdout.split(maxsplit=1)
    assert words == f"steps 1 to {steps}\n"
    return told


def trace(run: Path, steps: str, output: Path, *overrides: str) -> list[dict[str, Any]]:
    """What `data trace` says of each document; every digest must be the recorded one."""
    done = llmtrain("data", "trace", str(run), f"step={steps}", f"output={output}", *overrides)
    assert done.returncode == 0, done.stdout + done.stderr
    assert all(line.endswith(", as recorded") for line in done.stdout.splitlines())
    return [json.loads(line) for line in output.read_text().splitlines()]


@pytest.fixture(scope="module")
def alone(corpora: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An undisturbed run of one process."""
    run = tmp_path_factory.mktemp("alone") / "run"
    done = llmtrain(*arguments(corpora, run, MIXTURE, *ORDER, "data.workers=0"))
    assert done.returncode == 0, done.stderr
    return run


@pytest.mark.in_turns(3)
@pytest.mark.parametrize(("processes", "workers"), [(2, 2), (3, 0), (4, 2)])
def test_ranks_and_threads_do_not_change_what_is_consumed(
    corpora: Path, alone: Path, tmp_path: Path, processes: int, workers: int
):
    run = tmp_path / "run"
    settings = (MIXTURE, *ORDER, f"data.workers={workers}")
    # Two micro-batches a step, so that a rank's samples are of both.
    train(processes, arguments(corpora, run, *settings, steps=FEWER_STEPS, micro=12 // processes))
    assert consumed(run, FEWER_STEPS) == consumed(alone, FEWER_STEPS)


def test_kills_and_other_numbers_of_ranks_do_not_change_what_is_consumed(
    corpora: Path, alone: Path, tmp_path: Path
):
    run = tmp_path / "run"
    command = arguments(corpora, run, MIXTURE, *ORDER, micro=2)
    for turn, processes in enumerate((2, 4, 1)):
        ranks = start_ranks(processes, *command, f"data.workers={2 * (turn % 2)}")
        wait_for_step(random.SystemRandom().randint(15 * turn + 3, 15 * turn + 15), run, ranks[0])
        for rank in ranks:
            rank.kill()
        finish(ranks)
        assert max(record["step"] for record in metrics(run)) < STEPS, "killed too late"
    said = train(3, command)
    assert consumed(run) == consumed(alone)
    assert "resuming from" in said


def test_a_new_source_and_another_batch_disturb_no_other(corpora: Path, tmp_path: Path):
    run = tmp_path / "run"
    two = "data.mixture={web: 0.6, books: 0.4}"
    train(1, arguments(corpora, run, two, "data.shuffle_tars=2", steps=8))
    said = train(2, arguments(corpora, run, MIXTURE, "data.shuffle_tars=2", steps=16))
    assert "code joins the mixture at its beginning; the others continue" in said
    smaller = ("batch.global_size=10", "data.shuffle_tars=2")
    said = train(2, arguments(corpora, run, MIXTURE, *smaller, steps=24, micro=5))
    assert "batch.global_size was 24, is 10; no sample is lost by that" in said

    records = trace(run, "1:24", tmp_path / "trace.jsonl")
    samples = {record["sample"]: record for record in records}
    assert list(samples) == list(range(16 * 24 + 8 * 10))
    assert min(r["step"] for r in records if r["corpus"] == "code") > 8
    for name in ("web", "books", "code"):
        drawn = [record for record in samples.values() if record["corpus"] == name]
        assert [record["position"] for record in drawn] == list(range(len(drawn)))
        assert_epochs_are_whole(drawn)


def assert_epochs_are_whole(drawn: list[Mapping[str, Any]]) -> None:
    """Each epoch but the last takes every row of its corpus once, and not in one order."""
    epochs: dict[int, list[int]] = {}
    for record in drawn:
        epochs.setdefault(record["epoch"], []).append(record["row"])
    assert list(epochs) == list(range(len(epochs)))
    *whole, last = epochs.values()
    assert len(set(last)) == len(last)
    for rows in whole:
        assert sorted(rows) == list(range(len(rows)))
    assert all(len(rows) == len(whole[0]) for rows in whole)
    assert len(set(map(tuple, whole))) == len(whole)


def test_a_shard_that_is_bad_on_one_rank_is_skipped_by_all(corpora: Path, tmp_path: Path):
    """Two hosts with a copy of the corpus each, of which the second's has an altered shard."""
    hosts = [tmp_path / "first", tmp_path / "second"]
    for host in hosts:
        shutil.copytree(corpora / "web", host / "corpus")
    shard = hosts[1] / "corpus" / "train" / "train-000002.tar"
    content = bytearray(shard.read_bytes())
    content[700] ^= 1
    shard.write_bytes(content)
    overrides = ("data.shuffle_tars=2", "data.on_bad_tar=skip")

    run, shared = tmp_path / "run", rank_environment(2)
    command = arguments("corpus", run, *overrides, "data.workers=1", steps=12)
    ranks = [
        start(*command, cwd=host, **shared, RANK=str(rank), LOCAL_RANK=str(rank))
        for rank, host in enumerate(hosts)
    ]
    said = [rank.communicate(timeout=120)[1] for rank in ranks]
    assert [rank.returncode for rank in ranks] == [0, 0], said

    alone = tmp_path / "alone"
    done = llmtrain(*arguments(hosts[1] / "corpus", alone, *overrides, steps=12))
    assert done.returncode == 0, done.stderr
    skipped = [record.get("skipped_samples", 0) for record in metrics(run)]
    assert sum(skipped) > 0
    assert skipped == [record.get("skipped_samples", 0) for record in metrics(alone)]
    assert consumed(run, 12) == consumed(alone, 12)
    assert "train-000002.tar is bad: its" in said[0]

    # As the second host sees it, the trace is what was consumed; the first cannot know.
    records = trace(run, "1:12", tmp_path / "trace.jsonl", f"data.path={hosts[1] / 'corpus'}")
    assert sum(record["row"] == -1 for record in records) == sum(skipped)
    assert not any("train-000002" in record.get("tar", "") for record in records)
    done = llmtrain("data", "trace", str(run), "step=1:12", f"data.path={hosts[0] / 'corpus'}")
    assert done.returncode == 1
    assert "these are not the data that the run read" in done.stdout
