"""Read the hosts of a launch from the environment, and find the network route to host 0."""

from __future__ import annotations

import ipaddress
import os
import re
import socket
import threading
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import dataclass, replace
from typing import NamedTuple

from llmtrain.errors import ConfigError, Problem

LOOPBACK = "127.0.0.1"
LOCALHOST = (
    "localhost",
    "localhost.localdomain",
    "localhost4",
    "localhost6",
    "ip6-localhost",
    "ip6-loopback",
)
"""Names that resolve to the own host on every host."""
DEFAULT_PORT = 29500
ELASTIC_RESTARTS = 100
"""Restarts of a job whose number of hosts may change, unless MAX_RESTARTS says otherwise."""
ANSWER_SECONDS = 15
"""Timeout of the test for a store, which answers at once from its own thread."""


@dataclass(frozen=True)
class Hosts:
    """The environment's description of a launch, for this host."""

    num_processes: int | None = None
    """Number of processes on this host; None: one per accelerator, or 1."""
    num_nodes: int = 1
    """Number of hosts; of a job that goes on with fewer, the most."""
    node_rank: int | None = 0
    """Rank of this host among `num_nodes`; None: ranks are assigned in order of arrival."""
    address: str = LOOPBACK
    """Address of host 0, or of the rendezvous host if ranks are assigned in order of arrival."""
    port: int = 0
    """Port of the store; 0: any free port, on a single host."""
    run_id: str = "llmtrain"
    least_nodes: int | None = None
    """Number of hosts with which the job still goes on; None: `num_nodes`."""
    max_restarts: int = 0
    """Most restarts of the ranks after failures."""

    @property
    def least(self) -> int:
        """Return the least number of hosts with which the job runs."""
        return self.num_nodes if self.least_nodes is None else self.least_nodes

    @property
    def is_elastic(self) -> bool:
        """Return whether the job goes on with fewer hosts."""
        return self.least < self.num_nodes

    @property
    def address_variable(self) -> str:
        """The environment variable that gave `address`."""
        return "RDZV_ENDPOINT" if self.node_rank is None else "MASTER_ADDR"

    @property
    def port_variable(self) -> str:
        """The environment variable that gave `port`."""
        return "RDZV_ENDPOINT" if self.node_rank is None else "MASTER_PORT"


def hosts_from_environment(environment: Mapping[str, str]) -> Hosts:
    """Read the variables that llmtrain.distributed.torchrun documents.

    Raise ConfigError with all problems.
    """
    problems: list[Problem] = []

    def whole_number(name: str, least: int, most: int | None = None) -> int | None:
        text = environment.get(name, "").strip()
        if not text:
            return None
        allowed = f"{least} or more" if most is None else f"{least} … {most}"
        if text.isdecimal() and least <= int(text) and (most is None or int(text) <= most):
            return int(text)
        problems.append(Problem(name, repr(text), allowed, "correct this environment variable"))
        return None

    num_processes = whole_number("NPROC_PER_NODE", 1)
    least, num_nodes = 1, 1
    bounds = environment.get("NNODES", "").strip()
    if found := re.fullmatch(r"([1-9]\d{0,5}):([1-9]\d{0,5})", bounds, re.ASCII):
        least, num_nodes = map(int, found.groups())
        if least > num_nodes:
            problems.append(Problem("NNODES", repr(bounds), "MIN:MAX with MIN ≤ MAX", "such as 2:3"))
    elif ":" in bounds:
        problems.append(Problem("NNODES", repr(bounds), "a number, or MIN:MAX", "such as 2:3"))
    else:
        least = num_nodes = whole_number("NNODES", 1) or 1
    restarts = whole_number("MAX_RESTARTS", 0)
    if restarts is None:
        restarts = ELASTIC_RESTARTS if least < num_nodes else 0
    endpoint = environment.get("RDZV_ENDPOINT", "").strip()
    address = environment.get("MASTER_ADDR", "").strip()
    run_id = environment.get("RDZV_ID", "").strip() or Hosts.run_id
    hosts = Hosts(num_processes, num_nodes)
    if endpoint:
        address, _, port = endpoint.rpartition(":") if ":" in endpoint else (endpoint, "", str(DEFAULT_PORT))
        if not address or not port.isdecimal() or not 0 < int(port) < 2**16:
            problems.append(Problem("RDZV_ENDPOINT", repr(endpoint), "HOST:PORT", "such as node1:29500"))
        else:
            hosts = Hosts(num_processes, num_nodes, None, address.strip("[]"), int(port), run_id)
    elif num_nodes > 1:
        port_number = whole_number("MASTER_PORT", 1, 2**16 - 1) or DEFAULT_PORT
        node_rank = whole_number("NODE_RANK", 0, num_nodes - 1)
        if not address:
            problems.append(
                Problem("MASTER_ADDR", "nothing", "the name or address of host 0", "or set RDZV_ENDPOINT")
            )
        if not environment.get("NODE_RANK", "").strip():
            remedy = f"give each of the {num_nodes} hosts its own rank"
            problems.append(Problem("NODE_RANK", "nothing", f"0 … {num_nodes - 1}", remedy))
        hosts = Hosts(num_processes, num_nodes, node_rank, address, port_number, run_id)
    if problems:
        raise ConfigError(problems)
    # A single host keeps the loopback: no other host connects.
    hosts = hosts if num_nodes > 1 else Hosts(num_processes)
    return replace(hosts, least_nodes=least if least < num_nodes else None, max_restarts=restarts)


def require_store(address: str, port: int, variable: str) -> None:
    """Raise ConfigError if the server on the port that `variable` gave is not a store of torch: torch would
    wait for its answer forever."""
    if not (_is_silent(address, port) and _answers_as_store(address, port)):
        got = f"{port} of {address}, where another program answers"
        holder = f"end that program (ss -ltnp 'sport = {port}' there names it)"
        remedy = f"{holder}, or give all hosts another port"
        raise ConfigError(Problem(variable, got, "a free port of that host", remedy))


def _is_silent(address: str, port: int) -> bool:
    """Return whether the server waits for a request, as stores do. torch would print the greeting of any
    other server as errors."""
    try:
        with socket.create_connection((address, port), timeout=1) as connection:
            connection.settimeout(0.3)
            connection.recv(1)
    except TimeoutError:
        return True
    except OSError:
        pass
    return False


def _answers_as_store(address: str, port: int) -> bool:
    from torch.distributed import DistError

    from llmtrain.distributed import stores

    answered = threading.Event()

    def ask() -> None:
        with suppress(DistError):
            stores.connect(address, port, ANSWER_SECONDS)
            answered.set()

    # torch's timeout covers the connection, not the answer.
    threading.Thread(target=ask, daemon=True).start()
    return answered.wait(ANSWER_SECONDS)


class Route(NamedTuple):
    """The network route from this host to another, or to itself."""

    interface: str
    own_address: str
    is_local: bool


def route_to(address: str, variable: str = "MASTER_ADDR") -> Route:
    """Return the network interface, and this host's address on it, that reach `address`, given by `variable`.

    Debian resolves the machine's own name to 127.0.1.1, where no other host can reach it. A name that
    resolves to the loopback therefore gets the interface of GLOO_SOCKET_IFNAME, or else of the default route,
    if there is one. `localhost` and a literal 127.x stay on the loopback.

    Raise ConfigError if the address cannot be resolved or reached.
    """
    if address.lower() in LOCALHOST:
        address = LOOPBACK
    try:
        resolved = socket.getaddrinfo(address, 9, type=socket.SOCK_DGRAM)
    except OSError as error:
        remedy = "give a name that this machine can resolve, or the host's address"
        raise ConfigError(Problem(variable, repr(address), f"a resolvable host ({error})", remedy)) from None
    own_address = next(filter(None, (_own_address(family, where[0]) for family, *_, where in resolved)), None)
    if own_address is None:
        raise ConfigError(Problem(variable, repr(address), "a host with a route to it", "check the network"))
    is_loopback = ipaddress.ip_address(own_address).is_loopback
    is_local = is_loopback or own_address in {where[0] for *_, where in resolved}
    if is_loopback and not _is_literal(address):
        chosen = _address_on(os.environ.get("GLOO_SOCKET_IFNAME", ""))
        own_address = chosen or _own_address(socket.AF_INET, "192.0.2.1") or own_address
    return Route(_interface_of(own_address), own_address, is_local)


def reachable_address(address: str) -> str:
    """Return the address at which this host reaches `address`: if that is this host, the own address of
    `route_to`. Return a name that does not resolve yet unchanged."""
    try:
        route = route_to(address)
    except ConfigError:
        return address
    return route.own_address if route.is_local else address


def restrict_to_interface(interface: str) -> None:
    """Make gloo and NCCL listen on this interface only, in this process and its children, unless the user
    chose another. By default they use the interface to which the host's own name resolves, or any."""
    os.environ.setdefault("GLOO_SOCKET_IFNAME", interface)
    # NCCL treats a name without = as a prefix.
    os.environ.setdefault("NCCL_SOCKET_IFNAME", f"={interface}")


def _own_address(family: int, towards: str | int) -> str | None:
    with socket.socket(family, socket.SOCK_DGRAM) as probe:
        try:
            # Connecting a UDP socket sends nothing; it only consults the routing table.
            probe.connect((towards, 9))
        except OSError:
            return None
        return str(probe.getsockname()[0])


def _address_on(interface: str) -> str | None:
    """Return this host's IPv4 address on an interface; None if it has none."""
    import psutil

    entries = psutil.net_if_addrs().get(interface, [])
    return next((entry.address for entry in entries if entry.family == socket.AF_INET), None)


def _interface_of(own_address: str) -> str:
    import psutil

    own_address = own_address.partition("%")[0]
    addresses = {
        entry.address.partition("%")[0]: name
        for name, entries in psutil.net_if_addrs().items()
        for entry in entries
        if entry.family in (socket.AF_INET, socket.AF_INET6)
    }
    if own_address not in addresses and ipaddress.ip_address(own_address).is_loopback:
        own_address = LOOPBACK
    return addresses[own_address]


def _is_literal(address: str) -> bool:
    try:
        ipaddress.ip_address(address)
    except ValueError:
        return False
    return True
