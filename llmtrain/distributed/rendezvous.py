"""Rendezvous of the launchers of a run's hosts: wait for all hosts and assign a node rank to each.

Uses a store that listens on one address and holds numbers and JSON. torch's own `c10d` rendezvous listens on
all addresses and unpickles whatever anybody writes there.
"""

from __future__ import annotations

import errno
import json
import os
import time
from collections.abc import Iterable

from torch.distributed import PrefixStore, Store, TCPStore
from torch.distributed.elastic.rendezvous import (
    RendezvousHandler,
    RendezvousInfo,
    RendezvousParameters,
    RendezvousStoreInfo,
    rendezvous_handler_registry,
)

from llmtrain.distributed import stores
from llmtrain.distributed.hosts import Hosts, Route, require_store
from llmtrain.distributed.launcher import await_host
from llmtrain.errors import ConfigError, LaunchError, Problem

BACKEND = "llmtrain"
"""The name under which the rendezvous is registered with torch's agent."""
POLL_SECONDS = 0.2
ALIVE_SECONDS = 10.0
"""A launcher without a heartbeat for this long has ended, and may have been restarted."""


class Rendezvous(RendezvousHandler):
    """The rendezvous handler of one launcher, called by torch's agent."""

    def __init__(self, hosts: Hosts, route: Route, seconds: float) -> None:
        """Serve the store if this is the serving host, else connect to it.

        seconds: timeout for the store, and again for the other hosts.
        Raise ConfigError if this host cannot listen, or another program uses the port; LaunchError if host 0
        does not answer.
        """
        self._hosts, self._seconds = hosts, seconds
        self._serves, self._address, self._store = _open_store(hosts, route, seconds)

    def settings(self) -> dict[str, RendezvousHandler]:
        """Return the `rdzv_configs` by which torch's launcher passes this handler to its agent."""
        rendezvous_handler_registry.register(BACKEND, _from_settings)
        return {"handler": self}

    def next_rendezvous(self) -> RendezvousInfo:
        """Wait for all hosts; return the node rank of this host and the store, which the ranks use too.

        Raise LaunchError if hosts are missing, or this host does not belong to the run.
        """
        node_rank = self._node_rank()
        ranks_store = RendezvousStoreInfo(self._address, self._store.port)
        return RendezvousInfo(
            PrefixStore("agent", self._store), node_rank, self._hosts.num_nodes, ranks_store
        )

    def _node_rank(self) -> int:
        store = PrefixStore("launchers", self._store)
        run = store.compare_set("run", "", self._hosts.run_id).decode()
        if run != self._hosts.run_id:
            got = f"{self._store.port} of {self._address}, which the run {run!r} uses"
            remedy = "give each run its own port, or all hosts of one run the same RDZV_ID"
            raise LaunchError(Problem(self._hosts.port_variable, got, remedy=remedy))
        name = self._name(store)
        heartbeats, deadline = _Heartbeats(store), time.monotonic() + self._seconds
        while True:
            store.add(f"heartbeats of {name}", 1)
            missing = self._admit(store, heartbeats) if self._serves else "host 0 waits for others"
            if store.check(["admitted"]):
                break
            if time.monotonic() > deadline:
                got = f"not all {self._hosts.num_nodes} hosts within {self._seconds:g} s ({missing})"
                remedy = "see the messages of the other hosts, or wait longer with START_TIMEOUT=seconds"
                raise LaunchError(Problem("start", got, remedy=remedy))
            time.sleep(POLL_SECONDS)
        admitted: list[int] = json.loads(store.get("admitted"))
        if name not in admitted or store.add(f"taken {name}", 1) > 1:
            got = f"too many hosts: all {self._hosts.num_nodes} have joined without this one"
            remedy = "give each host its own NODE_RANK, or wait for the earlier launch to end"
            raise LaunchError(Problem("start", got, remedy=remedy))
        return admitted.index(name)

    def _name(self, store: Store) -> int:
        """Return the number that identifies this launcher; the serving one is 0."""
        if self._serves:
            return 0
        return store.add("names", 1) if self._hosts.node_rank is None else self._hosts.node_rank

    def _admit(self, store: Store, heartbeats: _Heartbeats) -> str:
        """Admit the hosts once all have arrived; return a description of those that are missing."""
        wanted = self._hosts.num_nodes
        number_themselves = self._hosts.node_rank is None
        names = range(store.add("names", 0) + 1 if number_themselves else wanted)
        alive = heartbeats.alive(names)
        if len(alive) >= wanted:
            store.set("admitted", json.dumps(alive[:wanted]))
        joined = f"{len(alive)} of {wanted} joined"
        if number_themselves:
            return joined
        return f"{joined}, not NODE_RANK {', '.join(str(name) for name in names if name not in alive)}"

    @property
    def use_agent_store(self) -> bool:
        return True

    def get_backend(self) -> str:
        return BACKEND

    def get_run_id(self) -> str:
        return self._hosts.run_id

    def num_nodes_waiting(self) -> int:
        """Return 0: no host joins a run that has begun."""
        return 0

    def is_closed(self) -> bool:
        return False

    def set_closed(self) -> None:
        pass

    def shutdown(self) -> bool:
        return True


def _from_settings(parameters: RendezvousParameters) -> RendezvousHandler:
    handler: RendezvousHandler = parameters.config["handler"]
    return handler


class _Heartbeats:
    """Heartbeats of the launchers: each increments its own counter."""

    def __init__(self, store: Store) -> None:
        self._store = store
        self._last: dict[int, tuple[int, float]] = {}

    def alive(self, names: Iterable[int]) -> list[int]:
        """Return those of `names` whose counter changed within ALIVE_SECONDS."""
        now = time.monotonic()
        for name in names:
            count = self._store.add(f"heartbeats of {name}", 0)
            if count != self._last.get(name, (0, now))[0]:
                self._last[name] = (count, now)
        return [name for name in names if name in self._last and now - self._last[name][1] < ALIVE_SECONDS]


def _open_store(hosts: Hosts, route: Route, seconds: float) -> tuple[bool, str, TCPStore]:
    """Return whether this launcher serves the store, the address at which this host reaches it, and the
    store."""
    address = route.own_address if route.is_local else hosts.address
    if hosts.node_rank == 0 or (hosts.node_rank is None and route.is_local):
        address = route.own_address
        try:
            return True, address, stores.serve(address, hosts.port, seconds)
        except OSError as error:
            # If hosts number themselves, the first launcher on this host serves; a later one connects.
            if hosts.node_rank == 0 or error.errno != errno.EADDRINUSE:
                why = os.strerror(error.errno or errno.EADDRINUSE)
                got = f"{hosts.port}, on which this host cannot listen at {address} ({why})"
                holder = f"end the program that uses it (ss -ltnp 'sport = {hosts.port}' names it)"
                remedy = f"{holder}, or give all hosts another {hosts.port_variable}"
                problem = Problem(hosts.port_variable, got, "a free port of host 0", remedy)
                raise ConfigError(problem) from None
    else:
        await_host(address, hosts.port, seconds, "host 0")
    require_store(address, hosts.port, hosts.port_variable)
    return False, address, stores.connect(address, hosts.port, seconds)
