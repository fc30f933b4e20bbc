"""Signs of life of the launchers of a job: each counts up a number in the store that host 0 serves."""

from __future__ import annotations

import os
import sys
import threading
import time
from collections.abc import Callable, Iterable

from torch.distributed import DistError, PrefixStore, Store

from llmtrain.distributed import stores

ALIVE_SECONDS = 10.0
"""A launcher without a heartbeat for this long has ended, and may have been restarted."""
BEAT_SECONDS = 1.0
LOST_SECONDS = 30.0
"""A launcher that cannot reach the store for this long ends its ranks: the others go on without it."""


def beat(store: Store, name: int) -> None:
    """Give a sign of life of the launcher `name`."""
    store.add(f"heartbeats of {name}", 1)


class Heartbeats:
    """Heartbeats of the launchers: each increments its own counter."""

    def __init__(self, store: Store) -> None:
        self._store = store
        self._last: dict[int, tuple[int, float]] = {}
        self._looked = time.monotonic()

    def alive(self, names: Iterable[int]) -> list[int]:
        """Return those of `names` whose counter changed within ALIVE_SECONDS."""
        names, now = list(names), time.monotonic()
        if now - self._looked > ALIVE_SECONDS / 2:
            # Nobody looked meanwhile, as when this process, which may serve the store, was stopped.
            self._last = {name: (count, now) for name, (count, _) in self._last.items()}
        self._looked = now
        for name in names:
            count = self._store.add(f"heartbeats of {name}", 0)
            if count != self._last.get(name, (0, now))[0]:
                self._last[name] = (count, now)
        return [name for name in names if name in self._last and now - self._last[name][1] < ALIVE_SECONDS]


class Pulse:
    """Gives signs of life from a thread, and ends this process and its ranks when the store is lost.

    A call of the store may block as long as a cut network does, so another thread watches the first.
    """

    def __init__(self, address: str, port: int, name: int, on_lost: Callable[[], None]) -> None:
        """on_lost: called, from a thread, before this process ends because the store is lost."""
        self._where = address, port
        self._name = name
        self._on_lost = on_lost
        self._missed = 0
        self._is_over = threading.Event()
        for work in (self._beat, self._watch):
            threading.Thread(target=work, name=work.__name__, daemon=True).start()

    def stop(self) -> None:
        """Give no further sign of life, and end nothing from now on."""
        self._is_over.set()

    def _beat(self) -> None:
        store: Store | None = None
        while not self._is_over.wait(BEAT_SECONDS):
            try:
                if store is None:
                    store = PrefixStore("launchers", stores.connect(*self._where, ALIVE_SECONDS))
                beat(store, self._name)
                self._missed = 0
            except DistError:
                store = None

    def _watch(self) -> None:
        while not self._is_over.wait(BEAT_SECONDS):
            # Counted, not timed: a process that was stopped must first have the chance to ask again.
            self._missed += 1
            if self._missed * BEAT_SECONDS > LOST_SECONDS:
                print(
                    f"llmtrain: host 0 gave no answer for {LOST_SECONDS:.0f} s: this host ends its ranks",
                    file=sys.stderr,
                    flush=True,
                )
                self._on_lost()
                os._exit(1)
