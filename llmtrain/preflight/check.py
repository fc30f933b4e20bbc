"""The check of all ranks: facts over the key-value store, then figures over a process group."""

from __future__ import annotations

import json
import time
from typing import TYPE_CHECKING, Any

from llmtrain.config import encode
from llmtrain.distributed import agreement, launcher, processes
from llmtrain.distributed.agreement import Fact
from llmtrain.preflight import clocks, findings, inventory
from llmtrain.preflight.config import PreflightConfig
from llmtrain.preflight.links import Links, all_links
from llmtrain.preflight.measure import measure
from llmtrain.preflight.places import Places
from llmtrain.preflight.report import Report

if TYPE_CHECKING:
    import torch
    from torch.distributed import Store

GROUP_MINUTES = 1.0
"""How long a collective may take: of a broken network nobody must wait for long."""
GOODBYE_SECONDS = 5.0
"""How long rank 0, which may hold the store, waits for the others to read it before it ends."""


def check(config: PreflightConfig) -> Report:
    """Check this rank's host and device and its links to the others; all ranks call it.

    Return the report, complete on rank 0, with the same problems on all ranks. Where versions differ no
    process group is formed, which could hang, and nothing is measured.

    Raise LaunchError if ranks are missing, were started with another command, or cannot talk to each other.
    """
    started = time.monotonic()
    device = processes.pick_device(config.device)
    mine = inventory.take(config, device)
    size = launcher.world_size()
    if size == 1:
        report = Report(config, [mine], Places.of([mine]), [0.0])
        report.figures = [measure(device, config.seconds, lambda: None)]
    else:
        store = processes.open_store(launcher.rank(), launcher.start_seconds())
        report = _meet(config, store, device, mine)
        if report.problems:
            return report
        processes.start(device, timeout_minutes=GROUP_MINUTES, store=store)
        _measure_together(report, device)
    report.seconds = time.monotonic() - started
    if launcher.rank() == 0:
        report.problems = _judge(report)
    report.problems = processes.from_main(report.problems)
    return report


def _meet(config: PreflightConfig, store: Store, device: torch.device, mine: dict[str, Any]) -> Report:
    """Wait for all ranks, gather their inventories, compare clocks and versions."""
    rank, size, seconds = launcher.rank(), launcher.world_size(), launcher.start_seconds()
    same = {"device type": Fact(device.type, "give device=cpu, or a GPU to each rank")}
    for key, value in encode(config).items():
        same[key] = Fact(value, "start all ranks with the same command")
    import torch.distributed as dist

    agreement.check_ranks_agree(dist.PrefixStore("preflight/meeting", store), rank, size, same, seconds)
    store = dist.PrefixStore("preflight", store)
    store.set(f"inventory/{rank}", json.dumps(mine))
    inventories = [json.loads(text) for text in store.multi_get([f"inventory/{r}" for r in range(size)])]
    places = Places.of(inventories)
    offsets = clocks.offsets(store, rank, places)
    report = Report(config, inventories, places, offsets or [])
    report.problems = findings.version_problems(inventories, places)
    if report.problems and rank == 0:
        report.problems = _judge(report)
        store.set("problems", json.dumps([vars(problem) for problem in report.problems]))
        _await_others(store, size)
    elif report.problems:
        store.get("problems")
        store.add("read", 1)
    return report


def _await_others(store: Store, size: int) -> None:
    deadline = time.monotonic() + GOODBYE_SECONDS
    while store.add("read", 0) < size - 1 and time.monotonic() < deadline:
        time.sleep(0.05)


def _measure_together(report: Report, device: torch.device) -> None:
    config = report.config
    own = measure(device, config.seconds, processes.barrier)
    links = Links(device, report.places, config.seconds, config.link_bytes)
    reduced = links.all_reduce_bytes_per_second()
    own |= {f"all-reduce, {where}": speed for where, speed in reduced.items()}
    report.links = all_links(processes.gather(links.between_neighbours()))
    report.figures = processes.gather(own)


def _judge(report: Report) -> list[Any]:
    inventories, places, config = report.inventories, report.places, report.config
    return [
        *findings.version_problems(inventories, places),
        *findings.host_problems(inventories, places, config),
        *findings.clock_problems(report.clock_offsets, places, config),
        *findings.speed_problems(report.figures, places, config),
        *findings.link_problems(report.links, places, config),
    ]
