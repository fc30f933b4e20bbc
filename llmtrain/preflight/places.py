"""Which ranks run on which host, and names for both."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from llmtrain.distributed.agreement import format_ranks


@dataclass(frozen=True)
class Places:
    """The hosts of a run, in the order of their lowest ranks."""

    names: tuple[str, ...]
    """A name for each host, all different."""
    ranks: tuple[tuple[int, ...], ...]
    """The ranks on each host, ascending."""

    @staticmethod
    def of(inventories: Sequence[Mapping[str, Any]]) -> Places:
        """Group ranks by the launcher's number of their host, and by its name."""
        groups: dict[tuple[str, str], list[int]] = {}
        for rank, own in enumerate(inventories):
            groups.setdefault((own["node"], own["hostname"]), []).append(rank)
        hostnames = [hostname for _, hostname in groups]
        names = [
            hostname if hostnames.count(hostname) == 1 else f"{hostname} (node {node})"
            for node, hostname in groups
        ]
        return Places(tuple(names), tuple(map(tuple, groups.values())))

    @property
    def leaders(self) -> list[int]:
        """The lowest rank of each host."""
        return [ranks[0] for ranks in self.ranks]

    def host_of(self, rank: int) -> int:
        """Return the number of a rank's host."""
        return next(number for number, ranks in enumerate(self.ranks) if rank in ranks)

    def name_of(self, ranks: Sequence[int]) -> str:
        """Return a name for ranks: their hosts', where they are all of its ranks."""
        hosts = sorted({self.host_of(rank) for rank in ranks})
        whole = all(set(self.ranks[host]) <= set(ranks) for host in hosts)
        names = ", ".join(self.names[host] for host in hosts)
        plural = "s" if len(hosts) > 1 else ""
        if whole and len(self.names) > 1:
            return f"host{plural} {names} ({format_ranks(sorted(ranks))})"
        return f"{format_ranks(sorted(ranks))} (host{plural} {names})"
