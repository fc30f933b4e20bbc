"""Forward stop signals from the launcher to its ranks, and wait until they have saved."""

from __future__ import annotations

import os
import signal
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress

import psutil

from llmtrain.distributed import guard, stopping
from llmtrain.errors import INTERRUPTED_EXIT_CODE

IMPATIENT_SECONDS = 10.0
"""Time that ranks have to exit after a second Ctrl-C, which asks them to exit without saving."""
FORWARD_SECONDS = 0.2
"""Interval of looking for ranks that have not received the signal yet."""


class Forwarder:
    """Forwards stop requests to the child processes, the ranks, and kills those that exceed the deadline.

    torch's agent would kill them 30 seconds after SIGTERM, and does not handle SIGUSR1.
    """

    def __init__(self, patience: float) -> None:
        """patience: seconds that ranks have to save and exit after a stop request."""
        self.asked = False
        self._patience = patience
        self._deadline = 0.0
        self._has_ranks = False

    @contextmanager
    def listening(self) -> Iterator[None]:
        """Treat signals as requests to stop. Call this in the main thread."""
        has_nohup = signal.getsignal(signal.SIGHUP) == signal.SIG_IGN
        numbers = stopping.SIGNALS if has_nohup else (*stopping.SIGNALS, signal.SIGHUP)
        with stopping.listening(numbers, at_once=self._on_signal):
            yield

    def ranks_start(self) -> None:
        """Forward later requests: before this call there are no ranks, and a request ends the launcher."""
        if not _NO_RANKS:
            _NO_RANKS.add(guard.start())
        self._has_ranks = True

    def end_ranks(self) -> None:
        """Kill the ranks of this host."""
        _send(signal.SIGKILL, _ranks())

    def _on_signal(self, number: int) -> None:
        if not self._has_ranks:
            with suppress(OSError):
                os.write(2, b"llmtrain: stopped on request before the ranks were started\n")
            os._exit(INTERRUPTED_EXIT_CODE)
        if not self.asked:
            self.asked = True
            self._deadline = time.monotonic() + self._patience
            threading.Thread(target=self._stop_ranks, name="stop", daemon=True).start()
        elif number == signal.SIGINT:
            _send(signal.SIGINT, _ranks())
            self._deadline = min(self._deadline, time.monotonic() + IMPATIENT_SECONDS)

    def _stop_ranks(self) -> None:
        notified: set[psutil.Process] = set()
        while time.monotonic() < self._deadline:
            # A rank may have started since the last iteration.
            new = [rank for rank in _ranks() if rank not in notified]
            # SIGTERM, not SIGINT: the scheduler may have signalled the ranks too, and a second SIGINT would
            # make them exit without saving.
            _send(signal.SIGTERM, new)
            notified.update(new)
            time.sleep(FORWARD_SECONDS)
        if left := _ranks():
            got = f"killing {len(left)} ranks that did not exit in time after the stop request"
            print(f"llmtrain: {got}; give them more time with STOP_TIMEOUT=seconds", file=sys.stderr)
            _send(signal.SIGKILL, left)


_NO_RANKS: set[int] = set()
"""Process numbers of children that are no ranks."""


def _ranks() -> list[psutil.Process]:
    return [child for child in psutil.Process().children() if child.pid not in _NO_RANKS]


def _send(number: signal.Signals, ranks: list[psutil.Process]) -> None:
    for rank in ranks:
        with suppress(psutil.Error):
            rank.send_signal(number)
