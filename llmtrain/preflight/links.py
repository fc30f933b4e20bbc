"""How fast ranks talk to each other: all-reduces within hosts and over all, and messages between neighbours.

Neighbours are ranks next to each other on a host, and ranks of the same number on hosts next to each other,
in rings. The links of a ring are measured in two turns (three for an odd number), so that no rank has two at
once.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist

from llmtrain.distributed.processes import lost_rank
from llmtrain.errors import LaunchError, Problem
from llmtrain.preflight.measure import synchronize
from llmtrain.preflight.places import Places

MESSAGE_BYTES = {"cpu": 32 << 20, "cuda": 256 << 20}
SMALL_BYTES = 8
"""A message whose time is the latency."""
MOST_CALLS = 50


@dataclass(frozen=True)
class Link:
    """Two ranks that talk to each other."""

    first: int
    second: int
    between_hosts: bool
    bytes_per_second: float
    """In one direction at a time."""
    latency_seconds: float
    """Time of a message of 8 bytes."""


def ring_turns(length: int) -> list[list[tuple[int, int]]]:
    """Return the links of a ring of `length` places in turns, in each of which no place has two."""
    if length < 2:
        return []
    links = [(place, (place + 1) % length) for place in range(length if length > 2 else 1)]
    last = [links.pop()] if length > 2 and length % 2 else []
    return [turn for turn in (links[::2], links[1::2], last) if turn]


def turns(places: Places) -> list[tuple[bool, list[tuple[int, int]]]]:
    """Return (between hosts, pairs of ranks) of each turn."""
    within: list[list[tuple[int, int]]] = []
    for ranks in places.ranks:
        for number, turn in enumerate(ring_turns(len(ranks))):
            if number == len(within):
                within.append([])
            within[number] += [(ranks[a], ranks[b]) for a, b in turn]
    found = [(False, turn) for turn in within]
    for turn in ring_turns(len(places.ranks)):
        pairs = [
            pair for a, b in turn for pair in zip(places.ranks[a], places.ranks[b], strict=False)
        ]  # hosts may have different numbers of ranks
        found.append((True, pairs))
    return found


class Links:
    """Measures the links of this rank; all ranks call the same methods in the same order."""

    def __init__(
        self, device: torch.device, places: Places, seconds: float, message_bytes: int | None
    ) -> None:
        self.device, self.places, self.seconds = device, places, seconds
        size = message_bytes or MESSAGE_BYTES[device.type]
        self._message = torch.ones(max(1, size // 4), device=device)
        self._small = torch.ones(SMALL_BYTES // 4, device=device)
        self._rank = dist.get_rank()

    def between_neighbours(self) -> list[Link]:
        """Return the links whose first rank is this one."""
        found = []
        for between_hosts, pairs in turns(self.places):
            pair = next((pair for pair in pairs if self._rank in pair), None)
            latency = self._message_seconds(pair, self._small)
            a_message = self._message_seconds(pair, self._message)
            if pair is not None and pair[0] == self._rank:
                speed = self._message.nbytes / a_message
                found.append(Link(*pair, between_hosts, speed, latency))
        return found

    def all_reduce_bytes_per_second(self) -> dict[str, float]:
        """Return the bandwidth of each link of a ring in an all-reduce within this host ("host") and over all
        ranks ("all"), where there are several: 2 (n - 1) / n times the bytes over the time."""
        groups: dict[str, tuple[int, Any]] = {}
        for ranks in self.places.ranks:
            group = dist.new_group(list(ranks)) if len(ranks) > 1 else None
            if self._rank in ranks and group is not None:
                groups["host"] = (len(ranks), group)
        if len(self.places.ranks) > 1:
            groups["all"] = (dist.get_world_size(), dist.group.WORLD)
        found = {}
        for name in ("host", "all"):
            size, group = groups.get(name, (0, None))
            work = (lambda group=group: dist.all_reduce(self._message, group=group)) if group else None
            a_call = self._seconds(work)
            if work is not None:
                found[name] = 2 * (size - 1) / size * self._message.nbytes / a_call
            self._message.fill_(1.0)  # sums would grow beyond all bounds
        return found

    def _message_seconds(self, pair: tuple[int, int] | None, message: torch.Tensor) -> float:
        """Return the time of a message between a pair, half of the time there and back; 0 for no pair."""
        if pair is None:
            return self._seconds(None)
        peer = pair[1] if pair[0] == self._rank else pair[0]

        def exchange() -> None:
            if pair[0] == self._rank:
                dist.send(message, peer)
                dist.recv(message, peer)
            else:
                dist.recv(message, peer)
                dist.send(message, peer)

        try:
            return self._seconds(exchange) / 2
        except RuntimeError as error:
            said = lost_rank(error)
            if said is None:
                raise
            own, other = (self.places.name_of([rank]) for rank in (self._rank, peer))
            failure = LaunchError(
                Problem(own, f"no message through to {other} ({said})", "", "see their network")
            )
            failure.everywhere = False
            raise failure from error

    def _seconds(self, work: Callable[[], object] | None) -> float:
        """Return the mean time of `work()`, repeated equally often on all ranks; 0 for a rank without.

        The mean, as a rank that is late for one call makes others wait that are not."""

        def timed(calls: int) -> float:
            if work is None:
                return 0.0
            started = time.perf_counter()
            for _ in range(calls):
                work()
            synchronize(self.device)
            return (time.perf_counter() - started) / calls

        timed(1)  # connects
        slowest = torch.tensor([timed(1)], device=self.device)
        dist.all_reduce(slowest, op=dist.ReduceOp.MAX)
        calls = int(min(MOST_CALLS, max(1.0, self.seconds / max(1e-6, slowest.item()))))
        dist.barrier()
        return timed(calls)


def all_links(gathered: Sequence[Sequence[Link]]) -> list[Link]:
    """Return the links of all ranks, those within hosts first."""
    return sorted(
        (link for links in gathered for link in links),
        key=lambda link: (link.between_hosts, link.first, link.second),
    )
