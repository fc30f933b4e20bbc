"""plan calibrate and preflight's cluster_output: this machine as a cluster that plans can name."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
import yaml

from llmtrain.config import decode
from llmtrain.errors import LaunchError
from llmtrain.plan.config import ClusterConfig
from llmtrain.preflight.calibrate import _measure_together
from llmtrain.preflight.cluster_file import cluster_of, text_of
from llmtrain.preflight.config import PreflightConfig
from llmtrain.preflight.links import Link
from llmtrain.preflight.report import Report
from tests.support.warm import llmtrain
from tests.unit.preflight.test_findings import inventories, places


def report(hosts: int, ranks: int) -> Report:
    found = inventories(hosts, ranks)
    for own in found:
        own["device"] = {"type": "cuda", "name": "H100", "memory_bytes": 85_000_000_000}
    figures = [
        {
            "bf16 products": 7e14,
            "memory": 3e12,
            "upload": 5e10,
            "all-reduce, host": 3e11,
            "all-reduce, all": 2e10,
        }
        for _ in found
    ]
    links = [Link(0, 1, False, 4e11, 2e-6), Link(0, ranks, True, 4e10, 9e-6)]
    return Report(
        PreflightConfig(), found, places(hosts, ranks), [0.0], figures, links if hosts > 1 else links[:1]
    )


def test_figures_of_hosts_become_a_cluster():
    cluster = cluster_of(report(2, 2), "ours", **{"matrix_depth": 80.0, "matrix_depths.bf16": 90.0})
    assert (cluster.name, cluster.device, cluster.devices_per_node) == ("ours", "cuda", 2)
    assert (cluster.memory_bytes, cluster.peak_flops["bf16"]) == (85_000_000_000, 7e14)
    assert (cluster.node_bandwidth, cluster.network_bandwidth) == (4e11, 4e10)
    assert (cluster.node_latency, cluster.network_latency) == (2e-6, 9e-6)
    assert (cluster.host_bandwidth, cluster.memory_bandwidth) == (5e10, 3e12)
    efficiency = cluster.efficiency
    assert (efficiency.node_link, efficiency.network, efficiency.matrix_depth) == (0.75, 0.5, 80.0)
    assert efficiency.matrix_depths == {"bf16": 90.0}
    assert decode(ClusterConfig, yaml.safe_load(text_of(cluster, "Measured."))) == cluster
    alone = cluster_of(report(1, 2), "alone")
    assert alone.network_bandwidth == alone.node_bandwidth, "hosts that were not tried"


@pytest.mark.slow
def test_all_processes_measure_at_once():
    found = _measure_together(torch.device("cpu"), 2, 0.01, 1e10, None)
    assert [set(each.peaks) for each in found] == [{"fp32 products", "bf16 products"}] * 2
    for each in found:
        of_types = {f"{name}.{t}" for name in ("matrix_depths", "weight_gradients") for t in ("fp32", "bf16")}
        assert set(each.constants) == {"matrix_depth", "unfused", "attention", "kernel_seconds"} | of_types
        assert min(each.constants["kernel_seconds"], *each.peaks.values()) > 0
    with pytest.raises(LaunchError, match="some of which failed"):
        _measure_together(torch.device("cpu"), 2, 0.01, "not a number", None)  # type: ignore[arg-type]


@pytest.mark.slow
def test_a_machine_is_measured_and_planned_for(tmp_path: Path):
    file = tmp_path / "cluster" / "here.yaml"
    file.parent.mkdir()
    done = llmtrain("plan", "calibrate", f"output={file}", "device=cpu", "seconds=0.02")
    assert done.returncode == 0, done.stderr
    assert done.stdout == file.read_text()
    assert f"choose it by --config-dir {tmp_path} cluster=here" in done.stderr
    cluster = decode(ClusterConfig, yaml.safe_load(file.read_text()))
    assert list(cluster.problems()) == []
    assert set(cluster.peak_flops) == {"fp32", "bf16"}
    assert cluster.node_bandwidth is not None
    words = ["model=gpt_tiny", "device=cpu", "format=json", "--config-dir", str(tmp_path), "cluster=here"]
    plan = json.loads(llmtrain("plan", *words).stdout)
    assert 0 < plan["seconds_per_step"] < 600
    again = llmtrain("plan", "calibrate", f"output={file}")
    assert again.returncode == 2
    assert "which is there already" in again.stderr
    named = llmtrain("plan", "calibrate", "output=here.json")
    assert named.stderr == "llmtrain: error: output: got 'here.json'; allowed: a name with .yaml\n"
