"""Measure this machine for plans: what preflight measures, and the constants of the time model.

Links are those between processes that are started here, and all else is measured in as many at once as a run
has.
"""

from __future__ import annotations

import json
import os
import socket
import subprocess
import sys
import tempfile
from pathlib import Path
from statistics import median
from typing import Any

import torch

from llmtrain.distributed import processes
from llmtrain.errors import LaunchError, Problem
from llmtrain.plan.config import ClusterConfig
from llmtrain.preflight import inventory
from llmtrain.preflight.cluster_file import cluster_of
from llmtrain.preflight.config import CalibrateConfig, PreflightConfig
from llmtrain.preflight.constants import READY, Measured, measure_constants
from llmtrain.preflight.links import Link
from llmtrain.preflight.measure import measure
from llmtrain.preflight.places import Places
from llmtrain.preflight.report import Report

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
    bandwidth = median(own["memory"] for own in report.figures)
    multiprocessors: int | None = report.inventories[0]["device"].get("multiprocessors")
    if count == 1:
        found = [measure_constants(device, config.seconds, bandwidth, multiprocessors)]
    else:
        found = _measure_together(device, count, config.seconds, bandwidth, multiprocessors)
    report.figures = [{**own, **each.peaks} for own, each in zip(report.figures, found, strict=True)]
    constants = {key: median(each.constants[key] for each in found) for key in found[0].constants}
    return cluster_of(report, config.output.stem, **constants)


def _check_together(device: torch.device, count: int, seconds: float) -> Report:
    """Return what preflight finds on `count` processes of this machine."""
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
        together = {"MASTER_PORT": str(port), "MASTER_ADDR": "127.0.0.1"}
        ranks = _start(command, count, together, stderr=subprocess.STDOUT)
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


def _measure_together(
    device: torch.device, count: int, seconds: float, bandwidth: float, multiprocessors: int | None
) -> list[Measured]:
    """Return the constants that each of `count` processes measures while the others do too."""
    words = [device.type, str(seconds), str(bandwidth), str(multiprocessors or 0)]
    command = [sys.executable, "-m", "llmtrain.preflight.constants", *words]
    ranks = _start(command, count, {}, stdin=subprocess.PIPE, stderr=subprocess.PIPE)
    try:
        if all(process.stdout.readline().strip() == READY for process in ranks):
            for process in ranks:
                process.stdin.write("go\n")
                process.stdin.flush()
        said = [process.communicate(timeout=WAIT_SECONDS) for process in ranks]
    except subprocess.TimeoutExpired:
        said = [("", f"no end within {WAIT_SECONDS:g} s")]
    finally:
        for process in ranks:
            process.kill()
            process.wait()
    if any(process.returncode for process in ranks):
        why = " ".join(" ".join(errors for _, errors in said).split())[-300:]
        raise LaunchError(Problem("processes", f"{count}, some of which failed ({why})", "fewer"))
    return [Measured(**json.loads(output)) for output, _ in said]


def _start(command: list[str], count: int, together: dict[str, str], **streams: Any) -> list[Any]:
    """Start `command` as `count` processes of this machine that share its threads."""
    inherited = {k: v for k, v in os.environ.items() if not k.startswith(OF_LAUNCHERS)}
    ranks = []
    for rank in range(count):
        own = {"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": str(count), **together}
        own["LOCAL_WORLD_SIZE"] = str(count)
        own.setdefault("OMP_NUM_THREADS", str(max(1, torch.get_num_threads() // count)))
        environment = {**inherited, **own}
        ranks.append(subprocess.Popen(command, env=environment, stdout=subprocess.PIPE, text=True, **streams))  # noqa: S603
    return ranks
