"""Messages between hosts while a run goes on, over a separate connection to the ranks' store.

One rank of each host speaks for all of it, in a message of some hundred bytes a second. The first host's
speaker reads them all: it is the judge. Another takes over when the judge has been silent for some time.

    host/H       what host H last said
    judge        who is the judge, and which numbered question it asks
    answer/Q/H   the answer of host H to question Q
    end          how the job ends
"""

from __future__ import annotations

import json
import time
from collections.abc import Callable
from typing import Any

from torch.distributed import DistError, PrefixStore, Store

TAKE_OVER_SECONDS = 6.0, 3.0
"""Silence of the judge after which host 0 takes over, and how much more each further host waits."""
RETRY_SECONDS = 5.0
"""Time from a failure of the store to the next attempt."""


class Board:
    """One host's view of the store. None of its methods raises."""

    def __init__(self, connect: Callable[[], Store], prefix: str, host: int, num_hosts: int) -> None:
        """connect: opens a connection to the store; called again after a failure."""
        self._connect, self._prefix = connect, prefix
        self.host, self.num_hosts = host, num_hosts
        self._store: Store | None = None
        self._failed_at = -RETRY_SECONDS
        self._beats = 0
        self._judge: dict[str, Any] = {}
        self._judge_seen = time.monotonic()
        self._seen: dict[int, tuple[int, float]] = {}
        self.answered_at = time.monotonic()
        """When the store last answered."""
        self.question = 0
        """The number of the judge's last question; 0: none yet."""
        self.topic: dict[str, Any] = {}
        """What the judge last asked about."""
        self.end: dict[str, Any] | None = None
        """How the job ends, once that is decided."""

    def another(self) -> Board:
        """Return a view with a connection of its own, for another thread."""
        return Board(self._connect, self._prefix, self.host, self.num_hosts)

    @property
    def is_judge(self) -> bool:
        return self._judge.get("host") == self.host

    def exchange(self, said: dict[str, Any]) -> None:
        """Tell the others what this host says, and read what the judge asks."""
        self._beats += 1
        self._guarded(lambda store: self._exchange(store, said))

    def _exchange(self, store: Store, said: dict[str, Any]) -> None:
        now = time.monotonic()
        store.set(f"host/{self.host}", json.dumps({**said, "beat": self._beats}))
        before = self._judge
        if store.check(["judge"]):
            self._judge = json.loads(store.get("judge"))
        if self._judge != before and not self.is_judge:
            self._judge_seen = now
        first, further = TAKE_OVER_SECONDS
        patience = 0.0 if not self._judge and self.host == 0 else first + further * self.host
        if self.is_judge or now - self._judge_seen > patience:
            self.ask(self.question, self.topic)
        self.question, self.topic = self._judge.get("question", 0), self._judge.get("topic", {})
        if store.check(["end"]):
            self.end = json.loads(store.get("end"))

    def ask(self, question: int, topic: dict[str, Any]) -> None:
        """As judge, ask all hosts the question with this number."""
        self.question, self.topic = question, topic
        self._judge = {"host": self.host, "beat": self._beats, "question": question, "topic": topic}
        self._guarded(lambda store: store.set("judge", json.dumps(self._judge)))

    def hosts(self) -> dict[int, tuple[dict[str, Any], float]]:
        """Return host → its last message, and the seconds since it last changed."""
        return self._guarded(self._hosts) or {}

    def _hosts(self, store: Store) -> dict[int, tuple[dict[str, Any], float]]:
        now = time.monotonic()
        found = {}
        known = [
            host for host in range(self.num_hosts) if host in self._seen or store.check([f"host/{host}"])
        ]
        contents = store.multi_get([f"host/{host}" for host in known]) if known else []
        for host, content in zip(known, contents, strict=True):
            said = json.loads(content)
            if self._seen.get(host, (-1, now))[0] != said["beat"]:
                self._seen[host] = said["beat"], now
            found[host] = said, now - self._seen[host][1]
        return found

    def answer(self, question: int, content: dict[str, Any]) -> None:
        self._guarded(lambda store: store.set(f"answer/{question}/{self.host}", json.dumps(content)))

    def answers(self, question: int) -> dict[int, dict[str, Any]]:
        """Return host → its answer, of the hosts that have answered."""

        def read(store: Store) -> dict[int, dict[str, Any]]:
            keys = {host: f"answer/{question}/{host}" for host in range(self.num_hosts)}
            there = {host: key for host, key in keys.items() if store.check([key])}
            return {host: json.loads(store.get(key)) for host, key in there.items()}

        return self._guarded(read) or {}

    def decide(self, end: dict[str, Any]) -> dict[str, Any]:
        """Announce how the job ends; return the first announcement, if another host decided at the same
        time."""

        def write(store: Store) -> dict[str, Any]:
            decided: dict[str, Any] = json.loads(store.compare_set("end", "", json.dumps(end)))
            return decided

        return self._guarded(write) or end

    def _guarded(self, work: Callable[[Store], Any]) -> Any:
        """Do something with the store; None if it does not answer."""
        now = time.monotonic()
        if self._store is None and now - self._failed_at < RETRY_SECONDS:
            return None
        try:
            if self._store is None:
                self._store = PrefixStore(self._prefix, self._connect())
            found = work(self._store)
        except (DistError, RuntimeError, OSError, ValueError):
            # After a timeout the answer may still come, as that to another request: connect anew.
            self._store, self._failed_at = None, time.monotonic()
            return None
        self.answered_at = time.monotonic()
        return found
