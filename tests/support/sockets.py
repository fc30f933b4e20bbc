"""What listens where: the TCP sockets of a tree of processes, as Linux tells in /proc."""

from __future__ import annotations

import ipaddress
import os
import re
import time
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import NamedTuple

import psutil

_LISTENS = "0A"
PAUSE_SECONDS = 0.05


class Listener(NamedTuple):
    """A socket that waits for connections."""

    process: str
    """`launcher`, `rank R`, or `process` for one that is alone."""
    address: str
    port: int

    @property
    def is_on_loopback(self) -> bool:
        return ipaddress.ip_address(self.address).is_loopback


def listeners(root: psutil.Process) -> set[Listener]:
    """What `root` and all that it started listen on now, in the network namespace of each."""
    found: set[Listener] = set()
    try:
        tree = [root, *root.children(recursive=True)]
    except psutil.Error:
        return found
    for process in tree:
        try:
            name, own = _name(process), _inodes(process.pid)
            found |= {
                Listener(name, address, port)
                for inode, address, port in _listening_sockets(process.pid)
                if inode in own
            }
        except (OSError, psutil.Error):
            continue  # it has ended
    return found


def watch(
    roots: Sequence[psutil.Process], until: Callable[[], bool], seconds: float = 240
) -> list[set[Listener]]:
    """What each of these listened on at any look, from now until a look after `until()` is true."""
    seen: list[set[Listener]] = [set() for _ in roots]
    deadline, is_last = time.monotonic() + seconds, False
    while not is_last:
        is_last = until()
        assert time.monotonic() < deadline, f"not in {seconds} s; seen so far: {seen}"
        for found, root in zip(seen, roots, strict=True):
            found |= listeners(root)
        time.sleep(PAUSE_SECONDS)
    return seen


def _name(process: psutil.Process) -> str:
    # A warm one says itself what it is (see warm.py).
    if process.name() == "launcher" or re.fullmatch(r"rank \d+", process.name()):
        return process.name()
    rank = process.environ().get("RANK")
    if rank is not None:
        return f"rank {rank}"
    return "launcher" if any(word.endswith("torchrun") for word in process.cmdline()) else "process"


def _inodes(pid: int) -> set[str]:
    found = set()
    for name in os.listdir(f"/proc/{pid}/fd"):
        try:
            match = re.fullmatch(r"socket:\[(\d+)\]", os.readlink(f"/proc/{pid}/fd/{name}"))
        except OSError:
            continue
        if match:
            found.add(match[1])
    return found


def _listening_sockets(pid: int) -> Iterable[tuple[str, str, int]]:
    """Inode, address and port of each, of all processes in the namespace."""
    for table in ("tcp", "tcp6"):
        path = Path(f"/proc/{pid}/net/{table}")
        if not path.exists():  # a kernel without IPv6
            continue
        for line in path.read_text().splitlines()[1:]:
            _, local, _, state, *rest = line.split()
            if state == _LISTENS:
                address, port = local.split(":")
                yield rest[5], _decode(address), int(port, 16)


def _decode(address: str) -> str:
    """`0100007F` → 127.0.0.1: words of four bytes, each as this machine holds a number."""
    words = (int(address[i : i + 8], 16).to_bytes(4, "little") for i in range(0, len(address), 8))
    found = ipaddress.ip_address(b"".join(words))
    mapped = found.ipv4_mapped if isinstance(found, ipaddress.IPv6Address) else None
    return str(mapped or found)
