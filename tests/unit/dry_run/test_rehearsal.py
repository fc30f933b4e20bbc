"""A rank of any run is rehearsed in one process: what it holds, and what it sends."""

from __future__ import annotations

import json
from typing import Any

import pytest

from tests.support.warm import llmtrain

SMALL = ("model=gpt_tiny", "batch.micro_size=1", "batch.sequence_length=64", "cluster=h100_80g")
LAYERS, PARAMETERS = 6, 7_098_368


def rehearsed(*overrides: str) -> dict[str, Any]:
    words = dict(word.split("=", 1) for word in (*SMALL, *overrides))
    done = llmtrain("plan", "dry_run=true", "format=json", *(f"{k}={v}" for k, v in words.items()))
    assert done.returncode == 0, done.stderr
    found: dict[str, Any] = json.loads(done.stdout)["dry_run"]
    return found


def sent(found: dict[str, Any], kind: str, ranks: int) -> tuple[int, int]:
    """Number and bytes of the collectives of a kind over so many ranks."""
    named = [c for c in found["collectives"] if (c["kind"], c["ranks"]) == (kind, ranks)]
    return sum(c["number"] for c in named), sum(c["bytes"] for c in named)


def test_zero_1_reduces_each_gradient_and_gathers_each_weight_once() -> None:
    found = rehearsed("world_size=8", "rank=7", "batch.global_size=16", "parallel.zero=1")
    assert (found["coordinates"]["data"], found["layers"], found["parameters"]) == (7, LAYERS, PARAMETERS)
    _, gathered = sent(found, "all-gather", 8)
    _, reduced = sent(found, "all-reduce", 8)
    assert gathered == 4 * PARAMETERS
    assert 4 * PARAMETERS <= reduced < 4 * PARAMETERS + 1024  # and counts, the loss and the norm
    # Weights, and an eighth of their masters and of two moments.
    assert found["kept_bytes"] == pytest.approx(4 * PARAMETERS * (1 + 3 / 8), rel=0.01)
    assert found["peak_bytes"] == pytest.approx(found["planned_peak_bytes"], rel=0.3)


def test_zero_3_holds_an_eighth_and_gathers_the_rest() -> None:
    found = rehearsed("world_size=8", "rank=5", "batch.global_size=8", "parallel.zero=3", "precision=bf16")
    assert found["parameters"] == PARAMETERS
    # In two bytes for the forward pass; so small a model stays gathered for the backward pass.
    assert sent(found, "all-gather", 8)[1] == pytest.approx(2 * PARAMETERS, rel=0.05)
    weights = found["sent_bytes"]["weights, to replicas"]
    assert weights["plan"] == pytest.approx(weights["dry_run"], rel=0.05)
    assert sent(found, "reduce-scatter", 8)[1] == pytest.approx(2 * PARAMETERS, rel=0.01)


def test_ranks_of_a_pipeline_hold_their_stages_and_pass_hidden_states_on() -> None:
    layout = ("parallel.pipeline=2", "parallel.tensor=2", "parallel.zero=1", "precision=bf16")
    sizes = ("world_size=4096", "batch.global_size=4096")
    first, last = (rehearsed(*sizes, *layout, f"rank={rank}") for rank in (0, 4095))
    assert (first["coordinates"]["pipeline"], last["coordinates"]["pipeline"]) == (0, 1)
    assert first["layers"] + last["layers"] == LAYERS
    # Each of three micro-batches passes a hidden state on, half from each rank of a tensor group.
    hidden = 64 * 256 * 2 // 2
    assert first["micro_batches"] == 3
    for found, kind in ((first, "send"), (first, "receive"), (last, "send"), (last, "receive")):
        number, size = sent(found, kind, 2)
        assert number >= 3, (kind, found["collectives"])
        assert 3 * hidden <= size < 3 * hidden + 8192, (kind, found["collectives"])
    # Forward and backward, a layer's attention and its MLP each end in a sum over the tensor group.
    assert sent(first, "all-reduce", 2)[0] >= 3 * 4 * first["layers"]


@pytest.mark.parametrize(
    "own",
    [
        "model=gpt_tiny rank=0 recompute=full parallel.tensor_sequence=false",
        "model=gpt_tiny rank=15 recompute=full parallel.tensor_sequence=true",
        "model=gpt_tiny rank=15 recompute=selective parallel.tensor_sequence=false",
        "model=llama_tiny rank=0 recompute=selective parallel.tensor_sequence=true",
    ],
)
def test_the_plan_says_what_a_rank_of_a_3d_layout_sends(own: str) -> None:
    """To a percent, or 2 KB: the plan leaves out the shapes that stages tell each other, and the sums of the
    last norm's gradients; of so small a model these are the most. Selective recomputation communicates
    nothing, and a gated MLP its input once."""
    layout = ("parallel.pipeline=2", "parallel.tensor=2", "parallel.zero=1", "precision=bf16")
    found = rehearsed("world_size=16", "batch.global_size=16", *layout, *own.split())
    sent_bytes = found["sent_bytes"]
    assert sent_bytes.pop("counts, norms and others")["dry_run"] < 1024
    assert set(sent_bytes) == {
        "in the tensor group",
        "between stages",
        "weights, to replicas",
        "gradients, to replicas",
    }
    for name, of in sent_bytes.items():
        assert of["plan"] == pytest.approx(of["dry_run"], rel=0.01, abs=2048), name


def test_several_ranks_each_in_a_process_of_its_own() -> None:
    layout = ("world_size=16", "batch.global_size=16", "parallel.pipeline=2", "parallel.zero=1")
    done = llmtrain("plan", "dry_run=true", "format=json", *SMALL, *layout, "rank=middle,15,last")
    assert done.returncode == 0, done.stderr
    found = json.loads(done.stdout)["dry_runs"]
    assert [(each["rank"], each["coordinates"]["data"]) for each in found] == [(8, 0), (15, 7)]
    # Both are of the last stage and do the same work: nothing of one is left in the next.
    assert found[0]["collectives"] == found[1]["collectives"]
    assert found[0]["peak_bytes"] == found[1]["peak_bytes"]


def test_several_ranks_are_summed_up_in_a_table() -> None:
    sizes = ("world_size=3072", "batch.global_size=3072")
    done = llmtrain("plan", "dry_run=true", *SMALL, *sizes, "rank=first,3071")
    lines = done.stdout.splitlines()
    assert sum(line.startswith("dry run of rank ") for line in lines) == 2, done.stderr
    start = next(place for place, line in enumerate(lines) if line.split()[:2] == ["rank", "stage"])
    for row, rank in zip(lines[start + 1 : start + 3], ("0", "3,071"), strict=True):
        assert row.split()[:4] == [rank, "0", str(LAYERS), f"{PARAMETERS:,}"]


@pytest.mark.parametrize(
    ("overrides", "complaint"),
    [
        (("world_size=4", "rank=4"), "rank: got 4; allowed: 0 to 3"),
        (("world_size=4", "rank=[0,frist]"), "rank: got frist; allowed: 0 to 3"),
        (("world_size=4", "rank=-1"), "rank: got -1; allowed: 0 to 3"),
        (("world_size=4", "model=bert_tiny"), "give data.path"),
        (("world_size=4", "model=simple_cnn", "data=mnist"), "over images, whose rows cannot be made up"),
    ],
)
def test_what_cannot_be_rehearsed_is_one_line(overrides: tuple[str, ...], complaint: str) -> None:
    names = {word.split("=")[0] for word in overrides}
    usual = [word for word in (*SMALL, "batch.global_size=4") if word.split("=")[0] not in names]
    done = llmtrain("plan", "dry_run=true", *usual, *overrides)
    assert done.returncode == 2, done.stderr
    assert complaint in done.stderr
    assert len(done.stderr.splitlines()) == 1
