"""The time model, part by part: what must hold of each, and what was published of a layer."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest

from llmtrain.models.gpt.config import GPTConfig
from llmtrain.nn.model_config import Row
from llmtrain.nn.recompute_config import RecomputeConfig
from llmtrain.parallel.layout import Layout
from llmtrain.plan.config import AssumeConfig, ClusterConfig, EfficiencyConfig
from llmtrain.plan.memory import Trainable
from llmtrain.plan.times.attention import Call, attention_seconds
from llmtrain.plan.times.collectives import Group, gather_seconds, links_of, reduce_seconds, send_seconds
from llmtrain.plan.times.device import Device, device_of
from llmtrain.plan.times.layer import Setting, layer_passes
from llmtrain.plan.times.pipeline import estimated_seconds, simulated_seconds
from llmtrain.plan.times.products import layer_product_seconds, product_seconds
from llmtrain.plan.times.step import Host, StepTime, even_runs, step_time
from tests.support.clusters import cluster

A100 = cluster("a100_80g")
MEGATRON_22B = GPTConfig(
    vocab_size=51200, max_sequence_length=2048, hidden_size=6144, num_layers=48, num_heads=64, dropout=0.1
)


def a100() -> Device:
    device = device_of(A100, "bf16")
    assert device is not None
    return device


def layout(**changed: Any) -> Layout:
    sizes = {
        "tensor": 1,
        "pipeline": 1,
        "sequence": 1,
        "data": 1,
        "micro_size": 4,
        "accumulation": 1,
    } | changed
    return Layout(
        world_size=sizes["tensor"] * sizes["pipeline"] * sizes["sequence"] * sizes["data"],
        global_size=sizes["data"] * sizes["micro_size"] * sizes["accumulation"],
        sequence_length=2048,
        **({"zero": 0} | sizes),
    )


def setting(of: Layout, at: ClusterConfig = A100, **assumed: Any) -> Setting:
    device = device_of(at, "bf16")
    assert device is not None
    assume = AssumeConfig(**({"fused": True, "whole_recompute": True} | assumed))
    kernel = "flash" if assume.attention == "auto" else assume.attention
    row = Row(of.sequence_length, predicted=of.sequence_length)
    return Setting(device, links_of(at, of.world_size), of, row, assume, kernel, 2)


def step(of: Layout, model: GPTConfig = MEGATRON_22B, mode: str = "none", **assumed: Any) -> StepTime:
    recompute = RecomputeConfig(mode)  # type: ignore[arg-type]
    return step_time(model, setting(of, **assumed), recompute, 2, Host(25e9, 30e9))


def test_a_product_takes_what_its_tiles_take() -> None:
    device = a100()
    square = product_seconds(device, 8192, 8192, 8192)
    reached = 2 * 8192**3 / square / device.peak
    assert 0.9 * device.efficiency.matrix < reached < device.efficiency.matrix
    # 108 multiprocessors: one tile more than they have costs a whole wave more.
    assert product_seconds(device, 256, 128 * 109, 8192) > 1.1 * product_seconds(device, 256, 128 * 108, 8192)
    assert product_seconds(device, 8192, 8191, 8192) > 2 * square, "rows that are not aligned"
    thin = product_seconds(device, 1, 8192, 8192)
    assert thin >= 2 * 8192**2 / device.bandwidth, "bound by reading the matrix"


def test_a_processor_has_figures_for_each_type() -> None:
    """Those of bf16 change nothing in fp32; a slow weight gradient is one of a layer's three products."""
    efficiency = EfficiencyConfig(matrix_depths={"bf16": 512.0}, weight_gradients={"bf16": 0.5})
    here = replace(A100, multiprocessors=None, peak_flops={"fp32": 1e11, "bf16": 1e12}, efficiency=efficiency)
    times = []
    for precision in ("fp32", "bf16"):
        device = device_of(here, precision)  # type: ignore[arg-type]
        assert device is not None
        assert device.function_bytes == 4
        times.append(layer_product_seconds(device, 512, 512, 512))
    (forward, backward), (of_bf16, backward_of_bf16) = times
    assert backward == pytest.approx(2 * forward)
    assert backward_of_bf16 == pytest.approx(3 * of_bf16)
    rate = 512 / (512 + EfficiencyConfig().matrix_depth)
    assert of_bf16 == pytest.approx(forward * rate / 0.5 / 10, rel=0.05)


def test_flash_attention_saves_what_is_hidden_and_the_scores_traffic() -> None:
    call = Call(4, 4096, 2048.0, 16, 128, False, "flash")
    flash, scores = (
        attention_seconds(a100(), call),
        attention_seconds(a100(), replace(call, kernel="all_scores")),
    )
    assert sum(scores) > 2 * sum(flash)
    assert sum(attention_seconds(a100(), replace(call, kernel="flash1"))) == pytest.approx(2 * sum(flash))
    assert flash[1] == pytest.approx(2.5 * flash[0])


def test_collectives_by_links() -> None:
    links = links_of(A100, 64)
    size = 1e9
    node = size * 7 / 8 / (300e9 * A100.efficiency.node_link)
    assert gather_seconds(links, Group(8, 1), size) == pytest.approx(node, rel=0.02)
    assert reduce_seconds(links, Group(8, 1), size) == pytest.approx(2 * node, rel=0.02)
    # Eight ranks of a host share its eight adapters; one rank of each host has only its own.
    whole_hosts = gather_seconds(links, Group(64, 1), size)
    one_a_host = gather_seconds(links, Group(8, 8), size)
    assert one_a_host == pytest.approx(8 * whole_hosts, rel=0.05)
    assert gather_seconds(links, Group(1, 1), size) == 0
    assert send_seconds(links, 8, size) > 9 * send_seconds(links, 1, size)


@pytest.mark.parametrize(("stages", "micro_batches"), [(2, 1), (4, 8), (8, 64)])
def test_1f1b_idles_for_the_stages_before_and_after(stages: int, micro_batches: int) -> None:
    found = simulated_seconds([1.0] * stages, [2.0] * stages, micro_batches, 0.0)
    assert found == pytest.approx((micro_batches + stages - 1) * 3.0)


@pytest.mark.parametrize("chunks", [2, 3])
def test_interleaving_divides_the_idle_time(chunks: int) -> None:
    found = simulated_seconds([1.0] * 4, [2.0] * 4, 8, 0.0, chunks)
    assert found == pytest.approx(8 * 3.0 + 3 * 3.0 / chunks)


def test_the_estimate_of_a_schedule_is_near_the_simulation() -> None:
    for forward in ([1.0, 1, 1, 1.4], [1.2, 1, 1, 1], [1.0, 1.5, 1, 0.5]):
        backward = [2 * seconds for seconds in forward]
        for chunks in (1, 2):
            exact = simulated_seconds(forward, backward, 32, 0.01, chunks)
            assert estimated_seconds(forward, backward, 32, 0.01, chunks) == pytest.approx(exact, rel=0.04)


@pytest.mark.parametrize(
    ("mode", "shares", "published"),
    [("none", False, 19.6), ("none", True, 19.0), ("full", False, 27.2), ("selective", False, 20.9)],
)
def test_a_layer_takes_what_was_published(mode: str, shares: bool, published: float) -> None:
    """Milliseconds of a layer of 22 billion parameters, forward and backward (arXiv:2205.05198, table 4)."""
    of = layout(tensor=8, tensor_sequence=shares)
    recompute = RecomputeConfig(mode)  # type: ignore[arg-type]
    forward, backward, again = layer_passes(MEGATRON_22B, setting(of, attention="all_scores"), recompute)
    seconds = forward.seconds + backward.seconds
    if mode == "full":
        seconds += again.seconds
    elif mode == "selective":
        # Megatron computes the core of attention again; llmtrain all but the products.
        seconds += again.busy["attention"]
    assert 1000 * seconds == pytest.approx(published, rel=0.15)


def test_parts_sum_up_and_answer_for_what_they_are() -> None:
    plain = step(layout(tensor=8))
    assert plain.seconds == pytest.approx(sum(plain.parts.values()))
    assert plain.parts["tensor parallelism"] > 0
    assert "recomputation" not in plain.parts
    assert step(layout(tensor=8), mode="full").parts["recomputation"] > 0
    sharded = step(layout(data=16, zero=3))
    assert 0 < sharded.parts["weight gathers"] < sharded.busy["weight gathers"], "layers hide most of it"
    anew = step(layout(data=16, zero=3), regather=True).busy["weight gathers"]
    assert anew > sharded.busy["weight gathers"], "the last billion weights stay gathered"
    whole, own = (
        step(layout(data=16, zero=2), scatter_gradients=scatters).busy["gradient reduction"]
        for scatters in (False, True)
    )
    assert whole == pytest.approx(2 * own)
    away = step(layout(data=16, zero=1, offload_optimizer="cpu"))
    kept = step(layout(data=16, zero=1))
    assert away.parts["optimizer"] > kept.parts["optimizer"]
    assert away.parts["offload"] > 0


def test_a_pipeline_waits_for_its_slowest_stage_and_while_it_fills() -> None:
    piped = step(layout(tensor=8, pipeline=4, zero=1, accumulation=4))
    longer = step(layout(tensor=8, pipeline=4, zero=1, accumulation=32))
    interleaved = step(layout(tensor=8, pipeline=4, zero=1, accumulation=4), virtual_stages=3)
    shares = [each.parts["pipeline bubble"] / each.seconds for each in (piped, longer, interleaved)]
    assert shares[0] > 0.3
    assert shares[1] < 0.12
    assert shares[2] < 0.6 * shares[0]


def test_even_layers_leave_the_head_to_the_last_stage() -> None:
    runs = even_runs(MEGATRON_22B, layout(pipeline=4))
    assert [len(run) for run in runs] == [13, 12, 12, 13]
    assert runs[0].start == 0
    assert runs[-1].stop == 50
    uneven = even_runs(replace(MEGATRON_22B, num_layers=6), layout(pipeline=4))
    assert [list(run) for run in uneven] == [[0, 1, 2], [3, 4], [5], [6, 7]]


def test_what_does_not_train_takes_no_gradients() -> None:
    """Of 50 steps, embedding and 24 layers are frozen; or all but a thousandth of each layer."""
    model, of = MEGATRON_22B, layout(data=16, micro_size=4)
    count = model.parameter_count()
    upper = Trainable(count // 2, (0.0,) * 25 + (1.0,) * 25)
    beside = Trainable(count // 1000, (0.0, *(0.001,) * 48, 0.0))
    at, host = setting(of), Host(25e9, 30e9)

    def taken(trainable: Trainable | None) -> dict[str, float]:
        return step_time(model, at, RecomputeConfig("none"), 2, host, trainable=trainable).busy

    whole, half, little = taken(None), taken(upper), taken(beside)
    for part in ("optimizer", "gradient reduction"):
        assert half[part] == pytest.approx(whole[part] / 2, rel=0.01)
        assert little[part] < whole[part] / 500
    # Half of the layers have no backward pass; or all have that of their inputs alone.
    assert half["matrix products"] == pytest.approx(2 / 3 * whole["matrix products"], rel=0.05)
    assert little["matrix products"] == pytest.approx(2 / 3 * whole["matrix products"], rel=0.05)
    assert half["attention"] < 0.7 * little["attention"]
    assert little["attention"] == pytest.approx(whole["attention"])
