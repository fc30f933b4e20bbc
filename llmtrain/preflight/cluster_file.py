"""Figures of a check or of a calibration as a cluster, in the form of conf/cluster/, that plans can name."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from statistics import median
from typing import Any

import yaml

from llmtrain.config import decode, encode
from llmtrain.plan import machine
from llmtrain.plan.config import ClusterConfig
from llmtrain.preflight.links import Link
from llmtrain.preflight.report import Report

PRODUCTS = " products"


def cluster_of(report: Report, name: str, **constants: float) -> ClusterConfig:
    """Return the cluster that a check measured: the median of all ranks, and as many devices a host as host 0
    has ranks. Peaks and bandwidths are those that were reached, so that their efficiencies are 1.

    constants: keys of `efficiency` that were measured besides, dotted where one holds several by precision.
    Raise ConfigError for figures that cannot be.
    """
    figures, per_node = report.figures, len(report.places.ranks[0])
    device = report.inventories[0]["device"]

    def usual(figure: str) -> float | None:
        values = [own[figure] for own in figures if figure in own]
        return median(values) if values else None

    known = dict.fromkeys(key for own in figures for key in own)
    peaks = {key.removesuffix(PRODUCTS): usual(key) for key in known if key.endswith(PRODUCTS)}
    within, between = (_of_kind(report.links, between_hosts) for between_hosts in (False, True))
    upload = usual("upload")
    # A GPU alone on its host talks through the host's memory; other hosts are taken for as fast if not tried.
    node = within or between or (upload or usual("memory"), ClusterConfig.node_latency)
    network = between or node
    efficiency: dict[str, float] = {"matrix": 1.0, "memory": 1.0, "node_link": 1.0, "network": 1.0}
    efficiency |= _link_shares(usual("all-reduce, host"), node, "node_link")
    efficiency |= _link_shares(usual("all-reduce, all"), network, "network") if between else {}
    if not between:
        efficiency["network"] = efficiency["node_link"]
    memory = device.get("memory_bytes") or machine.memory_bytes() // per_node
    found = {
        "name": name,
        "device": device["type"],
        "devices_per_node": per_node,
        "memory_bytes": memory,
        "peak_flops": peaks,
        "memory_bandwidth": usual("memory"),
        "multiprocessors": device.get("multiprocessors"),
        "node_bandwidth": node[0],
        "node_latency": node[1],
        "network_bandwidth": network[0],
        "network_latency": network[1],
        "host_bandwidth": upload,
        "efficiency": {**efficiency, **_nested(constants)},
    }
    return decode(ClusterConfig, _rounded(found))


def _nested(constants: Mapping[str, float]) -> dict[str, Any]:
    """Return key.name → value as key → name → value."""
    found: dict[str, Any] = {}
    for key, value in constants.items():
        section, _, name = key.partition(".")
        if name:
            found.setdefault(section, {})[name] = value
        else:
            found[key] = value
    return found


def text_of(cluster: ClusterConfig, origin: str) -> str:
    """Return the content of a cluster file. origin: one line that says where the figures are from."""
    return f"# {origin}\n{yaml.safe_dump(encode(cluster), sort_keys=False)}"


def _of_kind(links: Sequence[Link], between_hosts: bool) -> tuple[float, float] | None:
    """Return bandwidth and latency of the links of a kind, or None if there are none."""
    kind = [link for link in links if link.between_hosts == between_hosts]
    if not kind:
        return None
    return median(link.bytes_per_second for link in kind), median(link.latency_seconds for link in kind)


def _link_shares(reached: float | None, link: tuple[float | None, float], key: str) -> Mapping[str, float]:
    """Return what share of a link's bandwidth an all-reduce reaches, at most all and a half."""
    return {key: min(1.5, reached / link[0])} if reached and link[0] else {}


def _rounded(value: Any) -> Any:
    """Return figures with four digits: more were not measured."""
    if isinstance(value, Mapping):
        return {key: _rounded(item) for key, item in value.items()}
    return float(f"{value:.4g}") if isinstance(value, float) else value
