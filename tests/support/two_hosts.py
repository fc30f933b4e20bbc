"""Two hosts on one machine: two network namespaces with addresses of their own, joined by a cable.

Both share this machine's name, which leads each of them to its own loopback.
"""

from __future__ import annotations

import ctypes
import os
import shutil
import subprocess
import tempfile
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TypeVar

from tests.support.warm import PRELUDE

T = TypeVar("T")
ADDRESSES = ("10.213.77.1", "10.213.77.2")
ENTER = """
import ctypes, os

folder, setns = os.getcwd(), ctypes.CDLL(None, use_errno=True).setns
for kind in ("net", "mnt"):
    with open(f"/proc/{pid}/ns/{{kind}}") as namespace:
        assert setns(namespace.fileno(), 0) == 0, os.strerror(ctypes.get_errno())
os.chdir(folder)
"""
"""What a warm process runs to enter the namespaces of the process {pid}."""


@dataclass(frozen=True)
class Hosts:
    """Two hosts that reach the first at `address`."""

    address: str
    prefixes: tuple[tuple[str, ...], tuple[str, ...]]
    """What starts a command on each."""
    entering: tuple[dict[str, str], dict[str, str]]
    """The environment with which a warm process is on each; see the function of this name."""
    names: tuple[str, ...] = ()
    """Their namespaces, below /run/netns."""
    links: tuple[str, ...] = ()
    """The end of the cable on each."""

    def plug(self, host: int, state: str) -> None:
        """Pull the cable of a host ("down"), or plug it in ("up")."""
        ip = self.prefixes[host][0]
        subprocess.run([ip, "-n", self.names[host], "link", "set", self.links[host], state], check=True)

    def on(self, host: int, work: Callable[[], T]) -> T:
        """Return what `work` returns, called where the network is a host's: a socket that it makes stays
        there."""

        def enter() -> T:
            setns = ctypes.CDLL(None, use_errno=True).setns
            with open(f"/run/netns/{self.names[host]}") as namespace:
                assert setns(namespace.fileno(), 0) == 0, os.strerror(ctypes.get_errno())
            return work()

        with ThreadPoolExecutor(1) as other:  # each thread has a network of its own
            return other.submit(enter).result()


@contextmanager
def entering(prefix: Sequence[str], file: Path) -> Iterator[dict[str, str]]:
    """Yield the environment with which a warm process (see warm.py) and all that it starts are where commands
    behind `prefix` are; `file` is written for it."""
    if not prefix:
        yield {}
        return
    with subprocess.Popen([*prefix, "sh", "-c", "echo; exec sleep 3600"], stdout=subprocess.PIPE) as holder:
        try:
            assert holder.stdout is not None
            holder.stdout.readline()  # the prefix has become the shell
            file.write_text(ENTER.format(pid=holder.pid))
            yield {PRELUDE: str(file)}
        finally:
            holder.kill()


class NoNamespacesError(Exception):
    """This machine makes no network namespaces, and says why."""

    def __init__(self, reason: str, *, is_kernel: bool) -> None:
        super().__init__(reason)
        self.is_kernel = is_kernel
        """Whether the kernel forbids it, and not only a user or a program that is missing."""


@contextmanager
def two_hosts(tag: str = "") -> Iterator[Hosts]:
    """tag: a few letters that tell these hosts from others of this process. Raises NoNamespacesError."""
    ip = shutil.which("ip", path=f"{os.environ['PATH']}:/usr/sbin:/sbin")
    if os.geteuid() != 0 or ip is None:
        raise NoNamespacesError("it needs root and `ip netns` (apt-get install iproute2)", is_kernel=False)
    names = (f"llmtrain-{os.getpid()}{tag}-a", f"llmtrain-{os.getpid()}{tag}-b")
    links = (f"lt{os.getpid()}{tag}a", f"lt{os.getpid()}{tag}b")
    commands = [["netns", "add", name] for name in names]
    commands.append(["link", "add", links[0], "type", "veth", "peer", "name", links[1]])
    for name, link, address in zip(names, links, ADDRESSES, strict=True):
        commands.append(["link", "set", link, "netns", name])
        commands.append(["-n", name, "address", "add", f"{address}/24", "dev", link])
        commands.append(["-n", name, "link", "set", link, "up"])
        commands.append(["-n", name, "link", "set", "lo", "up"])
    try:
        for command in commands:
            done = subprocess.run([ip, *command], capture_output=True, text=True)
            if done.returncode:
                raise NoNamespacesError(f"ip {' '.join(command)}: {done.stderr.strip()}", is_kernel=True)
        first, second = ((ip, "netns", "exec", name) for name in names)
        with tempfile.TemporaryDirectory() as folder, ExitStack() as stack:
            one, other = (
                stack.enter_context(entering(prefix, Path(folder, f"{number}.py")))
                for number, prefix in enumerate((first, second))
            )
            yield Hosts(ADDRESSES[0], (first, second), (one, other), names, links)
    finally:
        for name in names:
            subprocess.run([ip, "netns", "delete", name], capture_output=True)
