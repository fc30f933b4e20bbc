"""The hosts of a launch: what the environment tells of them, and how this one reaches the first."""

from __future__ import annotations

import ipaddress
import os
import socket
import threading
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import dataclass
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
"""Names that lead every host to itself; any other name may lead others to it."""
DEFAULT_PORT = 29500
ANSWER_SECONDS = 15
"""A store answers from a thread of its own, at once."""


@dataclass(frozen=True)
class Hosts:
    """This host's part of a launch, as the environment tells it."""

    num_processes: int | None = None
    """Processes on this host; null: its accelerators, or 1."""
    num_nodes: int = 1
    node_rank: int | None = 0
    """This host's place among `num_nodes`; null: the hosts number themselves as they come."""
    address: str = LOOPBACK
    """Where host 0 is reached; of hosts that number themselves, the one that the others meet at."""
    port: int = 0
    """0: any free port, on a single host."""
    run_id: str = "llmtrain"

    @property
    def address_variable(self) -> str:
        """The environment variable that gave `address`."""
        return "RDZV_ENDPOINT" if self.node_rank is None else "MASTER_ADDR"

    @property
    def port_variable(self) -> str:
        """The environment variable that gave `port`."""
        return "RDZV_ENDPOINT" if self.node_rank is None else "MASTER_PORT"


def hosts_from_environment(environment: Mapping[str, str]) -> Hosts:
    """Read the variables that llmtrain.distributed.torchrun describes.

    Raises ConfigError with every problem found.
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
    num_nodes = whole_number("NNODES", 1) or 1
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
                Problem("MASTER_ADDR", "nothing", "host 0's name or address", "or set RDZV_ENDPOINT")
            )
        if not environment.get("NODE_RANK", "").strip():
            remedy = f"give each of the {num_nodes} hosts its own"
            problems.append(Problem("NODE_RANK", "nothing", f"0 … {num_nodes - 1}", remedy))
        hosts = Hosts(num_processes, num_nodes, node_rank, address, port_number, run_id)
    if problems:
        raise ConfigError(problems)
    # Nobody but this host needs to reach it.
    return hosts if num_nodes > 1 else Hosts(num_processes)


def refuse_foreign(address: str, port: int, variable: str) -> None:
    """Raise ConfigError where what listens on the port that `variable` gave is none of torch's stores: torch
    would wait for a word of it without end."""
    if not (_waits_to_be_asked(address, port) and _answers_as_store(address, port)):
        got = f"{port} of {address}, where another program answers"
        remedy = (
            f"end what holds it (ss -ltnp 'sport = {port}' there names it), or give all hosts another port"
        )
        raise ConfigError(Problem(variable, got, "a free port of that host", remedy))


def _waits_to_be_asked(address: str, port: int) -> bool:
    """As stores do, and servers that greet do not: what they say, torch would print as errors of its own."""
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

    # torch's own limit holds for a connection and not for an answer.
    threading.Thread(target=ask, daemon=True).start()
    return answered.wait(ANSWER_SECONDS)


class Route(NamedTuple):
    """How this host speaks to another, or to itself."""

    interface: str
    own_address: str
    to_itself: bool


def route_to(address: str, variable: str = "MASTER_ADDR") -> Route:
    """The network interface, and this host's address on it, that lead to `address`, which `variable` gave.

    Debian names the machine itself 127.0.1.1, where no other host can reach it: a NAME that leads back
    to the loopback takes the interface that GLOO_SOCKET_IFNAME names, or else that of the default route, if
    there is one. `localhost` and a literal 127.x stay.

    Raises ConfigError when the address cannot be resolved or reached.
    """
    if address.lower() in LOCALHOST:
        address = LOOPBACK
    try:
        found = socket.getaddrinfo(address, 9, type=socket.SOCK_DGRAM)
    except OSError as error:
        remedy = "name the host as this machine's resolver knows it, or give its address"
        raise ConfigError(Problem(variable, repr(address), f"a resolvable host ({error})", remedy)) from None
    own_address = next(filter(None, (_own_address(family, where[0]) for family, *_, where in found)), None)
    if own_address is None:
        raise ConfigError(
            Problem(variable, repr(address), "a host that a route leads to", "check the network")
        )
    is_loopback = ipaddress.ip_address(own_address).is_loopback
    to_itself = is_loopback or own_address in {where[0] for *_, where in found}
    if is_loopback and not _is_literal(address):
        chosen = _address_on(os.environ.get("GLOO_SOCKET_IFNAME", ""))
        own_address = chosen or _own_address(socket.AF_INET, "192.0.2.1") or own_address
    return Route(_interface_of(own_address), own_address, to_itself)


def as_reached(address: str) -> str:
    """Return the address at which this host reaches `address`: its own one of route_to, where that is itself.
    A name that is not known yet stays."""
    try:
        route = route_to(address)
    except ConfigError:
        return address
    return route.own_address if route.to_itself else address


def keep_to(interface: str) -> None:
    """Have gloo and NCCL, in this process and those that it starts, listen on this interface alone, unless
    the user named another. They would take the one that this host's own name leads to, or any."""
    os.environ.setdefault("GLOO_SOCKET_IFNAME", interface)
    # NCCL takes a name without = for the beginning of one.
    os.environ.setdefault("NCCL_SOCKET_IFNAME", f"={interface}")


def _own_address(family: int, towards: str | int) -> str | None:
    with socket.socket(family, socket.SOCK_DGRAM) as probe:
        try:
            # This sends nothing: it only asks the routing table.
            probe.connect((towards, 9))
        except OSError:
            return None
        return str(probe.getsockname()[0])


def _address_on(interface: str) -> str | None:
    """This host's IPv4 address on an interface; None where it has none."""
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
