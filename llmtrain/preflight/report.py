"""The tables of a check, and all of it as one JSON object."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from statistics import median
from typing import Any

from llmtrain.config import encode
from llmtrain.errors import Problem
from llmtrain.preflight.config import PreflightConfig
from llmtrain.preflight.links import Link
from llmtrain.preflight.places import Places
from llmtrain.preflight.units import Unit, size_text, speed_text

MOST_ROWS = 32
"""Ranks or hosts that have rows of their own; of more, only the extremes are shown."""


@dataclass
class Report:
    """What was found, on rank 0."""

    config: PreflightConfig
    inventories: Sequence[Mapping[str, Any]]
    places: Places
    clock_offsets: Sequence[float]
    """Seconds by which each host's clock is ahead of host 0's."""
    figures: Sequence[Mapping[str, float]] = ()
    """Name → FLOP/s or bytes a second, for each rank."""
    links: Sequence[Link] = ()
    seconds: float = 0.0
    """Time of the whole check."""
    problems: list[Problem] = field(default_factory=list)

    def lines(self) -> Iterator[str]:
        """Yield the tables: versions, hosts, ranks, and the spread of each figure."""
        versions = self.inventories[0]["versions"]
        yield "versions   " + " · ".join(f"{name} {value}" for name, value in versions.items() if value)
        device, hosts = self.inventories[0]["device"]["name"], len(self.places.names)
        plural = "s" if hosts > 1 else ""
        yield f"ranks      {len(self.inventories)} on {hosts} host{plural}; device of rank 0: {device}"
        yield ""
        yield from table(("host", "ranks", "memory", "run folder", "tmp", "shm", "clock"), self._hosts())
        if not self.figures:
            return
        names = list(dict.fromkeys(name for own in self.figures for name in own))
        if len(self.figures) <= MOST_ROWS:
            yield ""
            yield from table(("rank", "host", *names), self._ranks(names))
        yield ""
        yield from table(("figure", "median", "worst", "of", "best"), self._spread(names))
        yield f"checked in {self.seconds:.0f} s"

    def _hosts(self) -> Iterator[list[str]]:
        for number, (name, ranks) in enumerate(zip(self.places.names, self.places.ranks, strict=True)):
            if number == MOST_ROWS:
                yield [f"… {len(self.places.names) - MOST_ROWS} more"]
                return
            free = self.inventories[ranks[0]]["free"]
            room = [
                "" if free[key] is None else size_text(free[key]) for key in ("memory", "run", "tmp", "shm")
            ]
            clock = f"{self.clock_offsets[number]:+.3f} s" if number < len(self.clock_offsets) else ""
            yield [name, str(len(ranks)), *room, clock]

    def _ranks(self, names: Sequence[str]) -> Iterator[list[str]]:
        for rank, own in enumerate(self.figures):
            cells = [speed_text(own[name], unit_of(name)) if name in own else "" for name in names]
            yield [str(rank), self.places.names[self.places.host_of(rank)], *cells]

    def _spread(self, names: Sequence[str]) -> Iterator[list[str]]:
        for name in names:
            values = {f"rank {rank}": own[name] for rank, own in enumerate(self.figures) if name in own}
            yield spread(name, values, unit_of(name))
        for between_hosts in (False, True):
            kind = [link for link in self.links if link.between_hosts == between_hosts]
            if kind:
                where = "between hosts" if between_hosts else "within a host"
                speeds = {f"ranks {link.first}-{link.second}": link.bytes_per_second for link in kind}
                yield spread(f"messages {where}", speeds, "B")
                delays = [link.latency_seconds * 1e6 for link in kind]
                worst = max(kind, key=lambda link: link.latency_seconds)
                slowest = f"ranks {worst.first}-{worst.second}"
                cells = (
                    f"{median(delays):.0f} µs",
                    f"{max(delays):.0f} µs",
                    slowest,
                    f"{min(delays):.0f} µs",
                )
                yield [f"latency {where}", *cells]

    def as_object(self) -> dict[str, Any]:
        """Return everything as plain values; speeds in FLOP/s and bytes a second, times in seconds."""
        return {
            "config": encode(self.config),
            "hosts": [
                {"name": name, "ranks": list(ranks)}
                for name, ranks in zip(self.places.names, self.places.ranks, strict=True)
            ],
            "clock_offsets_seconds": list(self.clock_offsets),
            "ranks": [
                {**own, "figures": dict(self.figures[rank]) if self.figures else {}}
                for rank, own in enumerate(self.inventories)
            ],
            "links": [asdict(link) for link in self.links],
            "seconds": self.seconds,
            "off": [str(problem) for problem in self.problems],
        }


def unit_of(name: str) -> Unit:
    """Return the unit of a figure by its name."""
    return "FLOP" if name.endswith("products") else "B"


def spread(name: str, values: Mapping[str, float], unit: Unit) -> list[str]:
    """Return the cells: name, median, lowest and whose it is, highest."""
    lowest = min(values, key=lambda key: values[key])
    speeds = [
        speed_text(value, unit) for value in (median(values.values()), values[lowest], max(values.values()))
    ]
    return [name, *speeds[:2], lowest, speeds[2]]


def table(head: Sequence[str], rows: Iterator[list[str]]) -> Iterator[str]:
    """Yield the lines of a table, its columns as wide as their widest cells."""
    cells = [list(head), *([*row, *[""] * (len(head) - len(row))] for row in rows)]
    widths = [max(map(len, column)) for column in zip(*cells, strict=True)]
    for row in cells:
        yield "  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip()
