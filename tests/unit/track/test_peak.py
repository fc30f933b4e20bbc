"""What MFU is a share of, and that no run shows more than all of it."""

from __future__ import annotations

import json
import time
from pathlib import Path

import pytest
import torch

from llmtrain.track import peak
from llmtrain.track.peak import PeakKeeper, kept_file, listed_peak


@pytest.fixture(autouse=True)
def own_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))


@pytest.fixture
def measured(monkeypatch: pytest.MonkeyPatch) -> list[float]:
    """What measurements give, in turn."""
    values: list[float] = []
    monkeypatch.setattr(peak, "_measured_flops", lambda precision, product: values.pop(0))
    return values


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
    peak = listed_peak(device, precision)
    assert (None if peak is None else peak.flops) == (None if tflops is None else tflops * 1e12)


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_a_processor_is_measured_quickly_and_the_figure_kept(precision: str) -> None:
    torch.ones(1)
    started = time.process_time()
    found = PeakKeeper("cpu", precision).peak
    assert time.process_time() - started < 20
    assert found is not None
    assert 1e8 < found.flops < 1e15
    ((key, kept),) = json.loads(kept_file().read_text()).items()
    assert kept == found.flops
    assert f"{torch.get_num_threads()} threads, {precision}" in key


def test_the_best_of_all_runs_on_a_machine_counts(measured: list[float]) -> None:
    """A start on a busy machine neither forgets what it can do nor shows a larger share for it."""
    shares = []
    for flops in (2e9, 1e9, 4e9):
        measured.append(flops)
        shares.append(PeakKeeper("cpu", "fp32").utilization(1e9))
    assert shares == [0.5, 0.5, 0.25]
    measured.append(1e9)
    assert PeakKeeper("cpu", "bf16").utilization(1e9) == 1.0, "other types have figures of their own"


def test_no_run_shows_more_than_all(measured: list[float]) -> None:
    measured += [1e9, 1.1e9, 3e9]
    keeper = PeakKeeper("cpu", "fp32")
    assert keeper.utilization(1.2e9) is None, "measured again: 1.1"
    assert keeper.utilization(1.2e9) == pytest.approx(0.4), "and again: 3"
    measured += [1e9]
    assert keeper.utilization(5e9) is None
    assert keeper.utilization(5e9) is None, "not measured a fifth time"
    assert keeper.utilization(1.5e9) == 0.5


def test_gpus_go_by_their_data_sheets_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda: "NVIDIA A100-SXM4-80GB")
    keeper = PeakKeeper("cuda", "bf16")
    assert keeper.peak is not None
    assert keeper.peak.source == "the data sheet of A100"
    assert (keeper.utilization(156e12), keeper.utilization(400e12)) == (0.5, None)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda: "Some future GPU")
    assert PeakKeeper("cuda", "bf16").utilization(1e12) is None
    assert not kept_file().exists()


@pytest.mark.parametrize("content", ["", "[1, 2]", '{"x": null}', "\x00"])
def test_a_damaged_or_unwritable_file_costs_nothing(content: str, measured: list[float]) -> None:
    kept_file().parent.mkdir(parents=True)
    kept_file().write_text(content)
    measured += [1e9, 2e9]
    assert PeakKeeper("cpu", "fp32").utilization(1e9) == 1.0
    kept_file().unlink()
    kept_file().mkdir()
    assert PeakKeeper("cpu", "fp32").utilization(1e9) == 0.5
