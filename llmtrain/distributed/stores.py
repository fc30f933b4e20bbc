"""Open the key-value stores (TCPStore) that launchers and ranks share: one process serves, others connect."""

from __future__ import annotations

import datetime
import socket

from torch.distributed import TCPStore

BACKLOG = 2048
"""Length of the queue of pending connections: all ranks of a large run may connect at once."""


def serve(address: str, port: int, seconds: float) -> TCPStore:
    """Return a store that listens at `address` only, on `port` (0: any free port). A store that torch opens
    itself listens on all addresses.

    seconds: timeout of each operation in this process.
    Raise OSError if this host cannot listen there.
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
        # The store takes ownership and closes it.
        master_listen_fd=listener.detach(),
    )


def connect(address: str, port: int, seconds: float) -> TCPStore:
    """Return the store that another process serves at `address` and `port`.

    seconds: timeout of each operation.
    Raise torch's DistError if no store answers.
    """
    return TCPStore(
        address,
        port,
        is_master=False,
        timeout=datetime.timedelta(seconds=seconds),
        wait_for_workers=False,
    )
