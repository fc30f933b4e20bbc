"""Check that the hosts of a job see one run folder: a later start may have others, or another first one."""

from __future__ import annotations

import json
import secrets
import socket
import time
from pathlib import Path

from torch.distributed import Store

from llmtrain import files
from llmtrain.errors import ConfigError, Problem

SEEN_SECONDS = 10.0
"""How long a network file system may take to show a file of another host."""
ANSWER_SECONDS = 60.0
GOODBYE_SECONDS = 5.0
_POLL_SECONDS = 0.2


def require_shared(store: Store, node_rank: int, num_nodes: int, folder: Path, why: str) -> None:
    """Raise ConfigError on all hosts unless each sees the file that host 0 leaves in `folder` for a moment.

    store: new for each call, and shared by the hosts. why: the setting that needs one folder.
    """
    if num_nodes == 1:
        return
    if node_rank == 0:
        token = folder / f".shared-{secrets.token_hex(8)}"
        try:
            folder.mkdir(parents=True, exist_ok=True)
            files.write_atomically(token, "")
        except OSError as error:
            store.set("blind", json.dumps([f"host 0 ({error.strerror})"]))
        else:
            store.set("token", token.name)
            try:
                blind = [name for name in _answers(store, num_nodes) if name]
            finally:
                token.unlink(missing_ok=True)
            store.set("blind", json.dumps(blind))
    else:
        _wait(store, ["token", "blind"])
        if store.check(["token"]):
            token = folder / store.get("token").decode()
            deadline = time.monotonic() + SEEN_SECONDS
            while not (seen := token.exists()) and time.monotonic() < deadline:
                time.sleep(_POLL_SECONDS)
            store.set(f"sees {node_rank}", "" if seen else socket.gethostname())
    _wait(store, ["blind"])
    if blind := json.loads(store.get("blind")) if store.check(["blind"]) else ["host 0 gave no answer"]:
        store.add("read", 1)
        deadline = time.monotonic() + GOODBYE_SECONDS
        while node_rank == 0 and store.add("read", 0) < num_nodes and time.monotonic() < deadline:
            time.sleep(_POLL_SECONDS)  # host 0 serves the store in which the others read it
        got = f"{folder}, which is not the same folder on {', '.join(blind)}"
        allowed = f"with {why}, a folder that all hosts share"
        remedy = "put it on a shared file system, and start on all hosts in the same working folder"
        raise ConfigError(Problem("run.dir", got, allowed, remedy))


def _answers(store: Store, num_nodes: int) -> list[str]:
    """Return, of each host but the first, "" or the name of one that does not see the file."""
    keys = [f"sees {node_rank}" for node_rank in range(1, num_nodes)]
    deadline = time.monotonic() + ANSWER_SECONDS
    while not store.check(keys) and time.monotonic() < deadline:
        time.sleep(_POLL_SECONDS)
    return [store.get(key).decode() if store.check([key]) else f"host {key.split()[1]}" for key in keys]


def _wait(store: Store, keys: list[str]) -> None:
    """Wait for any of the keys."""
    deadline = time.monotonic() + ANSWER_SECONDS + SEEN_SECONDS
    while not any(store.check([key]) for key in keys) and time.monotonic() < deadline:
        time.sleep(_POLL_SECONDS)
