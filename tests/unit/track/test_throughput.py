import time

import pytest

from llmtrain.track.throughput import (
    ThroughputMeter,
    listed_peak_flops,
    memory_bytes,
    model_flops_utilization,
    peak_flops,
)


def test_the_first_step_counts_only_until_there_is_a_second() -> None:
    meter = ThroughputMeter(window=3)
    assert meter.tokens_per_second == 0.0
    meter.add(100, 10.0)
    assert meter.tokens_per_second == 10.0
    meter.add(100, 1.0)
    assert meter.tokens_per_second == 100.0
    for _ in range(3):
        meter.add(100, 2.0)
    assert meter.tokens_per_second == 50.0


@pytest.mark.parametrize(
    ("device", "precision", "tflops"),
    [
        ("NVIDIA A100-SXM4-80GB", "bf16", 312),
        ("NVIDIA A100-SXM4-80GB", "fp32", 156),
        ("NVIDIA H100 80GB HBM3", "bf16", 989),
        ("NVIDIA H100 PCIe", "bf16", 756),
        ("NVIDIA A10G", "fp16", 70),
        ("NVIDIA L40S", "bf16", 362),
        ("NVIDIA GB200", "bf16", 2500),
        ("Tesla V100-SXM2-32GB", "fp16", 125),
        ("Tesla V100-SXM2-32GB", "bf16", None),
        ("Some future GPU", "bf16", None),
    ],
)
def test_listed_peaks(device: str, precision: str, tflops: float | None) -> None:
    assert listed_peak_flops(device, precision) == (None if tflops is None else tflops * 1e12)


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_the_processor_is_measured_once_and_quickly(precision: str) -> None:
    import torch

    torch.ones(1)
    peak_flops.cache_clear()
    started = time.perf_counter()
    peak = peak_flops("cpu", precision)
    assert time.perf_counter() - started < 5
    assert 1e8 < peak < 1e15
    assert peak_flops("cpu", precision) == peak


def test_mfu() -> None:
    assert model_flops_utilization(1000.0, 6e9, 312e12) == pytest.approx(0.01923, rel=1e-3)
    assert model_flops_utilization(1000.0, 6e9, 0.0) == 0.0


def test_memory_is_that_of_this_process() -> None:
    before = memory_bytes("cpu")
    block = bytearray(64 * 2**20)
    block[::4096] = b"x" * len(block[::4096])
    assert memory_bytes("cpu") - before > 48 * 2**20
