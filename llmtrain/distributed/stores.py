"""The key-value stores over which launchers and ranks find each other: one serves, the others connect."""

from __future__ import annotations

import datetime
import socket

from torch.distributed import TCPStore

BACKLOG = 2048
"""Connections that wait to be accepted: all ranks of a large run may come at once."""


def serve(address: str, port: int, seconds: float) -> TCPStore:
    """Return a store that listens at `address` alone, on `port` (0: any free one). A store that torch itself
    opens listens on all addresses.

    seconds: how long its own user waits for an answer.
    Raises OSError where this host cannot listen there.
    """
    family = socket.AF_INET6 if ":" in address else socket.AF_INET
    listener = socket.create_server((address, port), family=family, backlog=BACKLOG)
    own_port = listener.getsockname()[1]
    return TCPStore(
        address,
        own_port,
        is_master=True,
        timeout=datetime.timedelta(seconds=seconds),
        wait_for_workers=False,
        # The store closes it.
        master_listen_fd=listener.detach(),
    )


def connect(address: str, port: int, seconds: float) -> TCPStore:
    """Return the store that another process serves there.

    seconds: how long to wait for each answer.
    Raises torch's DistError where none answers.
    """
    return TCPStore(
        address,
        port,
        is_master=False,
        timeout=datetime.timedelta(seconds=seconds),
        wait_for_workers=False,
    )
