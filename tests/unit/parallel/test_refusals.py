"""Layouts that cannot run, each refused with the key, the value, the reason and what would do instead."""

from __future__ import annotations

import pytest

from llmtrain.errors import UserError
from llmtrain.train.resolve import resolve
from tests.support.training import compose
from tests.support.warm import llmtrain

GPT = ("model.num_heads=8", "batch.global_size=48", "batch.micro_size=2", "batch.sequence_length=64")
LLAMA = ("model=llama_tiny", *GPT[1:])

CASES = [
    # (overrides, processes, key, reason, remedy)
    (("parallel.tensor=3",), 4, "parallel:", "a divisor of the 4 processes", "start 3, 6 processes"),
    (("parallel.data=3",), 4, "parallel:", "a product of 4", "parallel.data=4"),
    (("parallel.tensor=0",), 1, "parallel.tensor:", "1 or more", ""),
    (("parallel.tensor=6",), 6, "parallel.tensor:", "a divisor of the 8 key-value heads", "nearest: 2"),
    (("parallel.tensor=16",), 16, "parallel.tensor:", "a divisor of the 8 key-value heads", "nearest: 8"),
    ((*LLAMA, "parallel.tensor=8"), 8, "parallel.tensor:", "4 key-value heads", "nearest: 4"),
    (
        (*LLAMA, "model.mlp_hidden_size=705", "parallel.tensor=2"),
        2,
        "parallel.tensor:",
        "a divisor of the 705 model.mlp_hidden_size",
        "nearest: 1",
    ),
    (
        ("model=lstm", "parallel.tensor=2"),
        2,
        "parallel.tensor:",
        "lstm runs data-parallel",
        "parallel.tensor=1",
    ),
    (("model=lstm", "parallel.pipeline=2", "parallel.zero=1"), 2, "parallel.pipeline:", "lstm runs", "=1"),
    (
        ("model=simple_cnn", "data=mnist", "parallel.sequence=2"),
        2,
        "parallel.sequence:",
        "simple_cnn runs data-parallel",
        "parallel.sequence=1",
    ),
    (
        ("parallel.tensor_sequence=true",),
        1,
        "parallel.tensor_sequence:",
        "within the tensor group",
        "parallel.tensor=2",
    ),
    (
        ("parallel.tensor=8", "parallel.tensor_sequence=true", "batch.sequence_length=60"),
        8,
        "batch.sequence_length:",
        "a multiple of sequence 1 · tensor 8 = 8",
        "nearest: 56, 64",
    ),
    (
        ("parallel.pipeline=2",),
        2,
        "parallel.zero:",
        "counts only each stage's own gradients",
        "parallel.zero=1",
    ),
    (
        ("parallel.pipeline=2", "parallel.zero=2"),
        2,
        "parallel.zero:",
        "a stage accumulates the gradients",
        "give parallel.zero=1",
    ),
    (
        ("parallel.pipeline=2", "parallel.zero=3"),
        2,
        "parallel.zero:",
        "1 with pipeline 2",
        "parallel.pipeline=1 with parallel.zero=3",
    ),
    (
        ("parallel.pipeline=2", "engine=local", "optimizer.max_grad_norm=0"),
        2,
        "parallel.pipeline:",
        "1 with engine=local",
        "engine=deepspeed",
    ),
    (
        ("parallel.pipeline=16", "parallel.zero=1", "model.num_layers=6"),
        16,
        "parallel.pipeline:",
        "1 to model.num_layers=6",
        "parallel.pipeline=4",
    ),
    (
        ("parallel.pipeline=2", "parallel.sequence=2", "parallel.zero=1"),
        4,
        "parallel.sequence:",
        "1 with pipeline parallelism",
        "parallel.tensor=2 parallel.tensor_sequence=true",
    ),
    (
        ("parallel.sequence=3", "batch.sequence_length=64"),
        3,
        "batch.sequence_length:",
        "a multiple of sequence 3 = 3",
        "nearest: 63, 66",
    ),
    (
        ("parallel.sequence=3", "batch.sequence_length=63"),
        3,
        "parallel.sequence:",
        "a divisor of the 8 key-value heads",
        "nearest: 1",
    ),
    (
        ("parallel.tensor=4", "parallel.sequence=4"),
        16,
        "parallel.sequence:",
        "the 2 key-value heads that tensor 4 leaves",
        "nearest: 2",
    ),
    (("parallel.zero=1", "engine=local"), 2, "parallel.zero:", "keeps whole copies", "engine=deepspeed"),
    (("parallel.zero=4",), 1, "parallel.zero:", "0, 1, 2, 3", ""),
    (("precision=fp16",), 1, "precision:", "fp32, bf16 on a cpu", "precision=bf16"),
    (
        ("precision=fp16", "device=cuda", "engine=deepspeed"),
        1,
        "precision:",
        "the loss scaler that fp16 needs only with ZeRO",
        "parallel.zero=1",
    ),
    (
        ("precision=fp16", "device=cuda", "parallel.tensor=2"),
        2,
        "precision:",
        "only in each process' own gradients",
        "engine=deepspeed with parallel.zero=1",
    ),
    (
        ("parallel.pipeline=2", "parallel.sequence=2", "parallel.tensor=2", "parallel.zero=1"),
        8,
        "parallel.sequence:",
        "1 with pipeline parallelism",
        "give parallel.sequence=1 parallel.tensor=4 parallel.tensor_sequence=true",
    ),
    (("batch.micro_size=5",), 2, "batch.global_size:", "a multiple of micro_size · data = 10", "nearest"),
    (
        ("exact_dropout=false", "model.dropout=0.1", "parallel.tensor=2"),
        2,
        "exact_dropout:",
        "must agree on the elements to drop",
        "exact_dropout=true",
    ),
    (
        ("model=bert_tiny", "parallel.sequence=2"),
        2,
        "parallel.sequence:",
        "pipeline, tensor and replicas",
        "=1",
    ),
    (
        ("model=bert_tiny", "parallel.tensor=2", "parallel.tensor_sequence=true"),
        2,
        "parallel.tensor_sequence:",
        "it needs all tokens of a sequence on one process",
        "parallel.tensor_sequence=false",
    ),
    (("model=bert_tiny", "data.packing=best_fit"), 1, "data.packing:", "one pair of texts", "packing=concat"),
    (("model=roberta_base", "objective=mlm_nsp"), 1, "model.num_segments:", "2 with", "objective=mlm"),
    (("model=bert_tiny", "objective.random=0.5"), 1, "objective.masked:", "1 or less", ""),
    (("model=bert_tiny", "+model.mask_id=7"), 1, "model.mask_id:", "all three special ids", ""),
    (("model=gpt_tiny", "objective=mlm"), 1, "objective:", "causal_lm", "a model of kind encoder"),
    (("model=t5_tiny", "parallel.sequence=2"), 2, "parallel.sequence:", "seq2seq can be divided over", ""),
    (("model=t5_tiny", "model.relative_buckets=6"), 1, "model.relative_buckets:", "a multiple of 4", ""),
    (("model=t5_tiny", "batch.sequence_length=5"), 1, "batch.sequence_length:", "with span_corruption", ""),
    (("model=bart_tiny", "batch.sequence_length=300"), 1, "batch.sequence_length:", "=256", "shorten it"),
    (
        ("model=bart_tiny", "objective=seq2seq", "objective.target_length=300"),
        1,
        "objective.target_length:",
        "1 to model.max_sequence_length=256",
        "",
    ),
    (("model=lstm", "recompute=full"), 1, "recompute", "", "recompute=none"),
    (("parallel.balance=layers",), 1, "parallel.balance:", "parameters", ""),
]


@pytest.mark.parametrize(("overrides", "processes", "key", "reason", "remedy"), CASES)
def test_refused(overrides: tuple[str, ...], processes: int, key: str, reason: str, remedy: str):
    mapping = compose([*GPT, *overrides]) if not overrides[0].startswith("model=") else compose(overrides)
    with pytest.raises(UserError) as caught:
        resolve(mapping, processes, data_optional=True)
    lines = [str(problem) for problem in caught.value.problems if str(problem).startswith(key)]
    assert lines, [str(problem) for problem in caught.value.problems]
    assert any(reason in line and remedy in line and "\n" not in line for line in lines), lines


@pytest.mark.parametrize("model", ["resnet20", "lstm", "mlp"])
@pytest.mark.parametrize("axis", ["tensor", "pipeline"])
def test_a_family_without_an_axis_is_told_so_in_one_line(model: str, axis: str) -> None:
    given = (f"model={model}", *(("data=mnist",) if model != "lstm" else ()), f"parallel.{axis}=2")
    with pytest.raises(UserError) as caught:
        resolve(compose(given), 2, data_optional=True)
    (problem,) = map(str, caught.value.problems)
    assert problem.startswith(f"parallel.{axis}: got 2 with model.family={model.rstrip('20')}"), problem
    assert "runs data-parallel, with ZeRO 0" + ("; give" if model == "resnet20" else " to 3; give") in problem


def test_from_the_command_line_before_torch_is_there():
    """Exit code 2, one line a problem, and nothing heavy imported on the way."""
    done = llmtrain(
        "train",
        "data.path=nowhere",
        "parallel.pipeline=2",
        "parallel.zero=2",
        WORLD_SIZE="2",
        RANK="0",
        PYTHONPROFILEIMPORTTIME="1",
    )
    assert done.returncode == 2
    imported = [line.rsplit("|")[-1].strip() for line in done.stderr.splitlines() if "import time" in line]
    assert imported
    assert "torch" not in imported
    assert "deepspeed" not in imported
    assert "parallel.zero: got 2; allowed: 1 with pipeline 2" in done.stderr
