"""Time of collectives by bytes, algorithm and link.

Rings as NCCL runs them: of a group with several ranks on each host, each host receives what it lacks once,
over the adapters of all its ranks, and hands it on over the links within the host (Thakur et al. 2005;
NCCL, "Operation-wise bus bandwidth" of nccl-tests' PERFORMANCE.md).
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from llmtrain.plan.config import ClusterConfig

Along = Literal["tensor", "sequence", "pipeline", "weights", "gradients"]
"""Purpose of sent bytes: an axis of the layout; or, among ranks that hold the same weights, gathers of
weights or reductions of gradients."""


@dataclass(frozen=True)
class Links:
    """The links of a cluster as collectives use them, in bytes per second of one rank."""

    per_node: int
    """Ranks of one host."""
    node: float
    node_latency: float
    network: float
    network_latency: float


@dataclass(frozen=True)
class Group:
    """A group of ranks that are `stride` apart."""

    size: int
    stride: int

    def on_one_node(self, links: Links) -> int:
        """Return how many of the group share a host."""
        return max(1, min(self.size, links.per_node // self.stride))

    def passed(self, size: float) -> float:
        """Return the bytes that each rank sends in a gather of `size` bytes in all, of which each has a part,
        in the reverse of it, or in an all-to-all of `size` bytes of each rank; an all-reduce sends twice as
        many."""
        return size * (self.size - 1) / self.size


def links_of(cluster: ClusterConfig, world_size: int) -> Links:
    """Return the links of a cluster; those that it does not state take no time."""
    efficiency, unlimited = cluster.efficiency, float("inf")
    return Links(
        cluster.devices_per_node or world_size,
        (cluster.node_bandwidth or unlimited) * efficiency.node_link,
        cluster.node_latency,
        (cluster.network_bandwidth or unlimited) * efficiency.network,
        cluster.network_latency,
    )


def gather_seconds(links: Links, group: Group, size: float) -> float:
    """Return the time in which each rank of a group gets all `size` bytes, of which each holds a part; the
    reverse, a reduce-scatter, takes as long."""
    if group.size == 1 or size == 0:
        return 0.0
    neighbours = group.on_one_node(links)
    hosts = -(-group.size // neighbours)
    within = size * (group.size - 1) / group.size / links.node if neighbours > 1 else 0.0
    latency = (neighbours - 1) * links.node_latency
    if hosts == 1:
        return within + latency
    between = size * (hosts - 1) / hosts / (neighbours * links.network)
    return max(within, between) + latency + (hosts - 1) * links.network_latency


def reduce_seconds(links: Links, group: Group, size: float) -> float:
    """Return the time of an all-reduce of `size` bytes: a reduce-scatter and a gather."""
    return 2 * gather_seconds(links, group, size)


def exchange_seconds(links: Links, group: Group, size: float) -> float:
    """Return the time of an all-to-all of which each rank holds `size` bytes."""
    if group.size == 1 or size == 0:
        return 0.0
    neighbours = group.on_one_node(links)
    part = size / group.size
    within = part * (neighbours - 1) / links.node + links.node_latency
    between = part * (group.size - neighbours)
    if between == 0:
        return within
    return max(within, between / links.network) + links.network_latency


def send_seconds(links: Links, stride: int, size: float) -> float:
    """Return the time in which a rank sends `size` bytes to the one that is `stride` further."""
    if stride < links.per_node:
        return size / links.node + links.node_latency
    return size / links.network + links.network_latency


def exposed(communication: float, computation: float, interference: float) -> float:
    """Return the time that a collective adds to the computation that it overlaps with: the part that does not
    overlap, and a share of the part that does, since both use the same multiprocessors and memory."""
    beside = min(communication, computation)
    return communication - beside + interference * beside
