"""Which launchers take part in an attempt of a job, as the host that serves the store decides."""

from __future__ import annotations

import json
import time
from collections.abc import Callable
from dataclasses import dataclass

from torch.distributed import Store

from llmtrain.distributed.hosts import Hosts
from llmtrain.distributed.liveness import Heartbeats
from llmtrain.distributed.succession import Succession


@dataclass(frozen=True)
class Helpers:
    """What a rendezvous asks of its launcher."""

    end_ranks: Callable[[], None] = lambda: None
    """Kill the ranks of this host."""
    is_stopping: Callable[[], bool] = lambda: False
    """Whether this launcher was asked to stop."""
    fits: Callable[[int], bool] = lambda num_nodes: True
    """Whether a job on so many hosts has a layout."""
    check_folder: Callable[[Store, int, int], None] = lambda store, node_rank, num_nodes: None
    """Raise ConfigError unless all admitted hosts see the same run folder."""
    on_lost: Callable[[Succession], None] = lambda succession: None
    """Called when host 0 is lost and another host may take its place, before the launcher ends for it."""
    left_out: Callable[[], None] = lambda: None
    """Called when the job goes on without this host, which waits for a restart."""
    join_seconds: float = 30.0
    """How long an elastic job that could run waits for more hosts at its start."""


class Admission:
    """Admits the hosts of one attempt, on host 0."""

    def __init__(
        self, hosts: Hosts, heartbeats: Heartbeats, store: Store, helpers: Helpers, is_first: bool
    ) -> None:
        """is_first: whether hosts that have come may wait for more."""
        self._hosts, self._heartbeats, self._store, self._helpers = hosts, heartbeats, store, helpers
        self._patience = helpers.join_seconds if is_first else 0.0
        self._most_ready, self._since = 0, time.monotonic()

    def admit(self, names: range) -> str:
        """Admit the hosts once enough have arrived; return a description of those that are missing."""
        wanted = self._hosts.num_nodes
        alive = self._heartbeats.alive(names)
        ready = [name for name in alive if self._store.check([f"ready {name}"])]
        if len(ready) > self._most_ready:
            self._most_ready, self._since = len(ready), time.monotonic()
        if len(ready) >= wanted or (
            len(ready) >= self._hosts.least and self._nobody_else_comes(ready, alive)
        ):
            count = self._fitting(min(wanted, len(ready)))
            if count:
                self._store.set("admitted", json.dumps(ready[:count]))
        joined = f"{len(ready)} of {wanted} joined"
        if self._hosts.node_rank is None:
            return joined
        return f"{joined}, not NODE_RANK {', '.join(str(name) for name in names if name not in ready)}"

    def _nobody_else_comes(self, ready: list[int], alive: list[int]) -> bool:
        """Return whether no other host is to be expected soon."""
        return ready == alive and time.monotonic() - self._since >= self._patience

    def _fitting(self, count: int) -> int:
        """Return the largest number of hosts, at most `count`, that has a layout; 0 if none has."""
        counts = range(count, self._hosts.least - 1, -1)
        return next((number for number in counts if self._helpers.fits(number)), 0)
