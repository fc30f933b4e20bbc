"""Measure this machine for plans: what preflight measures, and the constants of the time model.

Links are those between processes that are started here. The constants are taken from operations of torch:
products of several depths, norms, additions and activations of a layer, attention, and the smallest addition.
"""

from __future__ import annotations

import json
import os
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from statistics import median
from typing import Any

import torch
import torch.nn.functional as F

from llmtrain.distributed import processes
from llmtrain.errors import LaunchError, Problem
from llmtrain.plan.config import ClusterConfig, EfficiencyConfig
from llmtrain.plan.times.attention import Call, attention_seconds
from llmtrain.plan.times.device import Device
from llmtrain.preflight import inventory
from llmtrain.preflight.cluster_file import cluster_of
from llmtrain.preflight.config import CalibrateConfig, PreflightConfig
from llmtrain.preflight.links import Link
from llmtrain.preflight.measure import measure, median_seconds, precisions, shaped_product_flops
from llmtrain.preflight.places import Places
from llmtrain.preflight.report import Report

PRODUCT_ROWS = {"cpu": 1024, "cuda": 8192}
DEPTHS = (64, 256, 1024)
"""Inner dimensions of the products that are measured."""
TOKENS, WIDTH = {"cpu": 1024, "cuda": 16384}, 1024
"""Tokens and hidden_size of the layer whose operations on each element are measured."""
ROWS, HEADS, HEAD_WIDTH = 4, 8, 64
QUERIES = {"cpu": 512, "cuda": 4096}
STARTS = 1000
"""Operations on one number that are started to time a start."""
OF_LAUNCHERS = ("RANK", "WORLD_SIZE", "LOCAL_", "GROUP_", "ROLE_", "MASTER_", "TORCHELASTIC_", "SLURM_")
"""Beginnings of variables that tell a process that it is one of several."""
WAIT_SECONDS = 300.0


def calibrate(config: CalibrateConfig) -> ClusterConfig:
    """Return this machine as a cluster, named as its file is.

    Raise LaunchError if the processes that talk to each other fail, ConfigError for figures that cannot be.
    """
    device = processes.pick_device(config.device)
    count = config.processes or (torch.cuda.device_count() if device.type == "cuda" else 1)
    can_talk = device.type == "cpu" or torch.cuda.device_count() > 1
    together = _check_together(device, max(2, count), config.seconds) if can_talk else None
    if together is None or count == 1:
        own = inventory.take(PreflightConfig(), device)
        report = Report(PreflightConfig(), [own], Places.of([own]), [0.0])
        report.figures = [measure(device, config.seconds, lambda: None)]
        if together is not None:
            report.links = together.links
            shared = "all-reduce, host"
            report.figures = [{**report.figures[0], shared: together.figures[0][shared]}]
    else:
        report = together
    with torch.no_grad():
        constants, peaks = _product_constants(device, config.seconds)
    report.figures = [{**own, **peaks} for own in report.figures] if count == 1 else report.figures
    cluster = cluster_of(report, config.output.stem, **constants)
    with torch.no_grad():
        constants |= _layer_constants(cluster, device, config.seconds)
    return cluster_of(report, config.output.stem, **constants)


def _check_together(device: torch.device, count: int, seconds: float) -> Report:
    """Return what preflight finds on `count` processes of this machine."""
    inherited = {k: v for k, v in os.environ.items() if not k.startswith(OF_LAUNCHERS)}
    with tempfile.TemporaryDirectory() as folder, socket.create_server(("127.0.0.1", 0)) as probe:
        port = probe.getsockname()[1]
        probe.close()
        output = Path(folder) / "found.json"
        command = [
            sys.executable,
            "-m",
            "llmtrain",
            "preflight",
            f"device={device.type}",
            f"seconds={seconds}",
        ]
        command += [
            f"output={output}",
            "factor=1e9",
            *(f"room.{k}_bytes=0" for k in ("memory", "run", "tmp", "shm")),
        ]
        ranks = []
        for rank in range(count):
            own = {
                "RANK": str(rank),
                "LOCAL_RANK": str(rank),
                "WORLD_SIZE": str(count),
                "MASTER_PORT": str(port),
            }
            own |= {"LOCAL_WORLD_SIZE": str(count), "MASTER_ADDR": "127.0.0.1"}
            own.setdefault("OMP_NUM_THREADS", str(max(1, torch.get_num_threads() // count)))
            streams: Any = {"stdout": subprocess.PIPE, "stderr": subprocess.STDOUT, "text": True}
            ranks.append(subprocess.Popen(command, env={**inherited, **own}, **streams))  # noqa: S603
        try:
            said = [process.communicate(timeout=WAIT_SECONDS)[0] for process in ranks]
        except subprocess.TimeoutExpired:
            said = [f"no end within {WAIT_SECONDS:g} s"]
        finally:
            for process in ranks:
                process.kill()
                process.wait()
        if any(process.returncode for process in ranks) or not output.exists():
            why = " ".join(" ".join(said).split())[-300:]
            raise LaunchError(
                Problem("links", f"processes that failed ({why})", "", "run llmtrain preflight")
            )
        found = json.loads(output.read_text())
    report = Report(PreflightConfig(), found["ranks"], Places.of(found["ranks"]), [0.0])
    report.figures = [own["figures"] for own in found["ranks"]]
    report.links = [Link(**link) for link in found["links"]]
    return report


def _product_constants(device: torch.device, seconds: float) -> tuple[dict[str, float], dict[str, float]]:
    """Return the constant of the depth, and the peaks by name of their figures.

    The time model's rate of a product of depth k is P k / (k + d): so 1 / rate is linear in 1 / k, and the
    line through the measured points gives P and d. d is the mean over the types.
    """
    rows = PRODUCT_ROWS[device.type]
    peaks, depths = {}, []
    for precision in precisions(device):
        points = [
            (1 / depth, 1 / shaped_product_flops(device, precision, (rows, depth, rows), seconds / 2))
            for depth in DEPTHS
        ]
        # Least squares of relative errors: each point weighs as its rate squared.
        weights = [1 / y**2 for _, y in points]
        total = sum(weights)
        x_mean = sum(w * x for w, (x, _) in zip(weights, points, strict=True)) / total
        y_mean = sum(w * y for w, (_, y) in zip(weights, points, strict=True)) / total
        spread = sum(w * (x - x_mean) ** 2 for w, (x, _) in zip(weights, points, strict=True))
        slope = (
            sum(w * (x - x_mean) * (y - y_mean) for w, (x, y) in zip(weights, points, strict=True)) / spread
        )
        inverse = y_mean - slope * x_mean
        if slope <= 0 or inverse <= 0:  # the shallow products are as fast
            slope, inverse = 0.0, min(y for _, y in points)
        peaks[f"{precision} products"] = 1 / inverse
        depths.append(slope / inverse)
    return {"matrix_depth": sum(depths) / len(depths)}, peaks


def _layer_constants(cluster: ClusterConfig, device: torch.device, seconds: float) -> dict[str, float]:
    """Return the constants of operations on each element, of attention and of starts."""
    bandwidth = cluster.memory_bandwidth
    assert bandwidth is not None
    tokens, found = TOKENS[device.type], {}
    x_TD = torch.randn(tokens, WIDTH, device=device)
    x_TF = torch.randn(tokens, 4 * WIDTH, device=device)
    weight_D = torch.ones(WIDTH, device=device)

    def elements() -> object:
        normed = F.layer_norm(x_TD, (WIDTH,), weight_D, weight_D)
        return normed, x_TD + normed, F.gelu(x_TF, approximate="tanh")

    # What the time model counts of a norm, an addition and an activation in fp32: read and written once.
    size = tokens * WIDTH * (2 * 4 + 3 * 4 + 4 * 2 * 4)
    found["unfused"] = max(1.0, median_seconds(elements, device, seconds) * bandwidth / size)
    found["attention"] = _attention_share(cluster, device, seconds)
    found["kernel_seconds"] = _start_seconds(device)
    return found


def _attention_share(cluster: ClusterConfig, device: torch.device, seconds: float) -> float:
    precision = "bf16" if device.type == "cuda" else "fp32"
    queries = QUERIES[device.type]
    dtype = torch.bfloat16 if device.type == "cuda" else torch.float32
    q, k, v = torch.randn(3, ROWS, HEADS, queries, HEAD_WIDTH, device=device, dtype=dtype).unbind()
    a_call = median_seconds(lambda: F.scaled_dot_product_attention(q, k, v, is_causal=True), device, seconds)
    ideal = Device(
        cluster.peak_flops[precision],
        cluster.memory_bandwidth or 1.0,
        cluster.multiprocessors,
        dtype.itemsize,
        EfficiencyConfig(matrix=1.0, attention=1.0, memory=1.0),
    )
    call = Call(ROWS, queries, (queries + 1) / 2, HEADS, HEAD_WIDTH, dropout=False, kernel="flash")
    return min(1.5, attention_seconds(ideal, call)[0] / a_call)


def _start_seconds(device: torch.device) -> float:
    """Return the time in which the host starts one operation of the device, without waiting for its end."""
    number = torch.zeros(1, device=device)

    def starts(work: Callable[[], object]) -> float:
        started = time.perf_counter()
        for _ in range(STARTS):
            work()
        return (time.perf_counter() - started) / STARTS

    return median(starts(lambda: number.add_(1.0)) for _ in range(5))
