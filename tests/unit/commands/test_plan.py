"""`llmtrain plan` and `llmtrain plan search`: what they print, and what they refuse in one line."""

from __future__ import annotations

import json
import shlex
from typing import Any

import pytest

from llmtrain.cli.main import run_verb
from llmtrain.distributed import launcher
from llmtrain.plan.budget import loss, optimum
from llmtrain.plan.keys import BudgetConfig
from llmtrain.train.resolve import resolve
from tests.support.training import compose

LLAMA = ["cluster=h100_80g", "precision=bf16", "batch.sequence_length=8192"]
ON_64 = ["model=llama3_8b", *LLAMA, "batch.global_size=128", "batch.micro_size=1", "world_size=64"]
SMALL = ["model=gpt_tiny", "model.vocab_size=1000", "cluster=a100_40g", "precision=bf16"]

PIPED = ["world_size=2", "parallel=zero1", "parallel.pipeline=2"]
MEASURED = ["cluster.device=cpu", "cluster.devices_per_node=1", "cluster.memory_bytes=1000000000"]
MEASURED += [f"cluster.{name}=1e10" for name in ("memory_bandwidth", "node_bandwidth", "network_bandwidth")]


def printed(capsys: pytest.CaptureFixture[str], *arguments: str) -> Any:
    launcher.set_command(["llmtrain", "plan", *arguments])
    assert run_verb("plan", [*arguments, "format=json"]) == 0
    return json.loads(capsys.readouterr().out)


def refused(capsys: pytest.CaptureFixture[str], *arguments: str) -> str:
    assert run_verb("plan", list(arguments)) == 2
    lines = capsys.readouterr().err.splitlines()
    assert len(lines) == 1, lines
    return lines[0]


def test_json(capsys: pytest.CaptureFixture[str]) -> None:
    found = printed(
        capsys, *ON_64, "parallel.tensor=4", "parallel.pipeline=2", "parallel.zero=1", "recompute=selective"
    )
    assert found["parameters"] == 8_030_261_248
    assert found["seconds_per_step"] == pytest.approx(sum(found["parts"].values()))
    rate = 128 * 8192 / found["seconds_per_step"] / 64
    assert found["tokens_per_second_per_device"] == pytest.approx(rate)
    assert found["model_flops_utilization"] == pytest.approx(rate * found["flops_per_token"] / 989e12)
    assert len(found["memory"]) == 2
    assert all(stage["total"] == sum(stage.values()) - stage["total"] for stage in found["memory"])
    assert found["fits"] is True
    assert printed(capsys, *ON_64, "parallel.zero=0")["fits"] is False
    unknown = printed(capsys, "model=gpt_tiny")
    assert unknown["seconds_per_step"] is unknown["model_flops_utilization"] is None


def test_the_table_says_what_bounds_a_step_and_what_helps(capsys: pytest.CaptureFixture[str]) -> None:
    copies = "checkpoint.memory.every=20"
    assert run_verb("plan", [*ON_64, "parallel.zero=3", "recompute=full", "budget.days=30", copies]) == 0
    text = capsys.readouterr().out
    assert "bound by          matrix products" in text
    assert "what helps most: " in text
    assert "weight gathers" in text
    assert "draws 1000 W" in text
    assert "budget            46,080 device hours at" in text
    assert "\nhost memory for copies of one process' state: 5 times " in text


def test_the_best_layouts_are_commands_that_do_what_they_say(capsys: pytest.CaptureFixture[str]) -> None:
    found = printed(capsys, "search", *ON_64, "parallel.zero=3", "recompute=full", "top=3")
    seconds = [each["seconds_per_step"] for each in found["best"]]
    assert len(seconds) == 3
    assert seconds == sorted(seconds)
    assert found["own"]["seconds_per_step"] > seconds[0]
    assert "longer than the first: " in found["why"]
    first = found["best"][0]
    again = printed(capsys, *shlex.split(first["command"])[2:])
    assert again["fits"] is True
    # A search leaves out what storage takes of a step.
    assert again["seconds_per_step"] == pytest.approx(seconds[0], rel=1e-6)
    assert max(stage["total"] for stage in again["memory"]) == first["memory_bytes"]
    front = [(each["seconds_per_step"], each["memory_bytes"]) for each in found["front"]]
    assert front == sorted(front)
    assert [size for _, size in front] == sorted((size for _, size in front), reverse=True)


def test_a_search_compares_what_the_user_asks_for(capsys: pytest.CaptureFixture[str]) -> None:
    on_8 = ["search", *SMALL, "batch.global_size=96", "world_size=8"]
    own = printed(capsys, *on_8, "batch.micro_size=12", "parallel.balance=time", "top=1000")
    assert any(each["micro_size"] == 12 for each in own["best"]), "micro-batches that are no power of 2"
    assert own["own"]["seconds_per_step"] >= own["best"][0]["seconds_per_step"]
    local = printed(capsys, *on_8, "engine=local", "batch.micro_size=2", "top=1000")
    assert {(each["zero"], each["pipeline"]) for each in local["best"]} == {(0, 1)}
    aim = ["objective=memory", "batch.micro_size=2", "model.num_layers=12"]
    least = printed(capsys, "search", *SMALL, "batch.global_size=96", "world_size=8", *aim)
    assert "more memory than the first, and takes " in least["why"]
    assert least["best"][0]["offload_optimizer"] == "cpu"
    piped = printed(capsys, *on_8, "batch.micro_size=2", "assume.virtual_stages=3", "top=1000")
    assert {each["pipeline"] for each in piped["best"]} == {1, 2}, "six layers have no 12 runs"


def test_other_aims(capsys: pytest.CaptureFixture[str]) -> None:
    on_16 = ["model=llama3_8b", *LLAMA, "batch.global_size=32", "world_size=16", "top=1"]
    by_time = printed(capsys, "search", *on_16)["best"][0]
    by_memory = printed(capsys, "search", *on_16, "objective=memory")["best"][0]
    by_cost = printed(capsys, "search", *on_16, "rank_by=cost")["best"][0]
    assert by_memory["memory_bytes"] < by_time["memory_bytes"]
    assert by_memory["seconds_per_step"] > by_time["seconds_per_step"]
    assert by_cost["dollars_per_step"] <= by_time["dollars_per_step"]
    assert by_cost["world_size"] <= 16


def test_the_text_of_a_search(capsys: pytest.CaptureFixture[str]) -> None:
    words = ["search", *SMALL, "batch.global_size=64", "world_size=8", "top=2", "budget.days=1"]
    launcher.set_command(["llmtrain", "plan", *words])
    assert run_verb("plan", words) == 0
    text = capsys.readouterr().out
    assert text.count("llmtrain plan") == 2
    assert "the default layout " in text
    assert "  this model" in text
    assert "|o" in text


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (
            ["search", *SMALL, "batch.global_size=64", "world_size=7"],
            "world_size: got 7; allowed: processes that batch.global_size=64 and the model divide into; "
            "nearest: 6, 8",
        ),
        (
            ["search", *LLAMA, "model=llama3_70b", "world_size=1", "batch.global_size=64"],
            "with which a layout fits",
        ),
        (["search", "model=gpt_tiny"], "cluster: got local, whose peaks are of: none"),
        ([*SMALL, "budget.device_hours=1e-9"], "budget.device_hours: got 1e-09; allowed: "),
        (
            [*SMALL, "cluster.memory_bandwidth=null"],
            "cluster.memory_bandwidth: got nothing; allowed: a figure",
        ),
        ([*SMALL, "cluster.network_bandwidth=25"], "cluster.network_bandwidth: got 25.0; allowed: 1e+06 to"),
        ([*SMALL, "cluster.peak_flops.bf16=312"], "cluster.peak_flops.bf16: got 312"),
        (["serch", *SMALL], "llmtrain plan: got 'serch'"),
        (
            [*SMALL, "parallel=auto", "parallel.tensor=2"],
            "parallel.tensor: got 2 with parallel=auto; allowed: 1: the planner chooses it",
        ),
        (
            ["model=simple_cnn", "data=mnist", "cluster=a100_40g", "budget.days=1"],
            "budget.days: got 1 with a model of images; allowed: null",
        ),
        ([*SMALL, "budget.size_exponent=0.001"], "budget.size_exponent: got 0.001; allowed: 0.05 to 1"),
        (
            ["model=gpt_tiny", "cluster.memory_bandwidth=1e11"],
            "cluster.device: got nothing; allowed: a figure of it and of devices_per_node, ",
        ),
        (
            [*SMALL, *PIPED, "batch.micro_size=32", "assume.virtual_stages=2"],
            "assume.virtual_stages: got 2 with 1 micro-batches a step; allowed: 1, or ",
        ),
        (
            ["search", "model=llama3_8b", "world_size=1", "cluster.peak_flops.fp32=1e12", *MEASURED],
            "a shorter batch",
        ),
        ([*SMALL, "assume.virtual_stages=1000"], "assume.virtual_stages: got 1000; allowed: 1 to "),
    ],
)
def test_mistakes_are_one_line(
    capsys: pytest.CaptureFixture[str], arguments: list[str], message: str
) -> None:
    assert message in refused(capsys, *arguments)


def test_parallel_auto_is_the_first_of_a_search(capsys: pytest.CaptureFixture[str]) -> None:
    first = printed(capsys, "search", *ON_64, "top=1")["best"][0]
    mapping = compose(["model=llama3_8b", *LLAMA, "batch.global_size=128", "parallel=auto"], "train")
    resolved = resolve(mapping, 64, data_optional=True)
    layout = resolved.layout
    for name in ("data", "tensor", "pipeline", "sequence", "zero", "micro_size"):
        assert getattr(layout, name) == first[name], name
    assert resolved.config.recompute.mode == first["recompute"]


def test_parallel_auto_keeps_what_may_shrink_and_heeds_what_trains() -> None:
    words = [*SMALL, "parallel=auto", "device=cpu"]
    whole = resolve(compose([*words, "parallel.elastic=[data,tensor]"], "train"), 8, data_optional=True)
    assert whole.config.parallel.elastic == ("data", "tensor")
    frozen = resolve(compose([*words, "train.freeze=[blocks.*]"], "train"), 8, data_optional=True)
    assert frozen.trainable is not None
    assert frozen.layout != whole.layout, "what has few gradients to reduce is divided otherwise"


def test_parallel_auto_on_a_machine_that_nobody_measured() -> None:
    mapping = compose(["model=gpt_tiny", "parallel=auto", "device=cpu"], "train")
    resolved = resolve(mapping, 4, data_optional=True)
    assert resolved.layout.world_size == 4
    assert resolved.layout.data == 4


def test_a_budget_is_spent_where_the_loss_is_least() -> None:
    budget = BudgetConfig()
    parameters, tokens = optimum(budget, 5.76e23)
    assert 6 * parameters * tokens == pytest.approx(5.76e23)
    best = loss(budget, parameters, tokens)
    assert best < loss(budget, 1.1 * parameters, tokens / 1.1)
    assert best < loss(budget, parameters / 1.1, 1.1 * tokens)
    # Chinchilla's own budget: 40 billion by approach 3 (arXiv:2203.15556, table A3 and section 3.4).
    assert 30e9 < parameters < 45e9
