"""What a launcher does with the signals that ask it to stop: its ranks are to save, and it waits for them."""

from __future__ import annotations

import os
import signal
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress

import psutil

from llmtrain.distributed import stopping
from llmtrain.errors import INTERRUPTED_EXIT_CODE

IMPATIENT_SECONDS = 10.0
"""How long ranks have after a second Ctrl-C, which asks them to end unsaved."""
TELL_SECONDS = 0.2


class Forwarder:
    """Passes the wish to stop on to this process' children, the ranks, and kills those that take too long.

    torch's agent would kill them 30 seconds after SIGTERM, and knows no SIGUSR1.
    """

    def __init__(self, patience: float) -> None:
        """patience: seconds in which ranks save and end once they were asked to stop."""
        self.asked = False
        self._patience = patience
        self._deadline = 0.0
        self._has_ranks = False

    @contextmanager
    def listening(self) -> Iterator[None]:
        """Take signals as requests; in the main thread alone."""
        has_nohup = signal.getsignal(signal.SIGHUP) == signal.SIG_IGN
        numbers = stopping.SIGNALS if has_nohup else (*stopping.SIGNALS, signal.SIGHUP)
        with stopping.listening(numbers, at_once=self._on_signal):
            yield

    def ranks_start(self) -> None:
        """From now on there may be ranks."""
        self._has_ranks = True

    def _on_signal(self, number: int) -> None:
        if not self._has_ranks:
            with suppress(OSError):
                os.write(2, b"llmtrain: stopped before the ranks were started, as asked\n")
            os._exit(INTERRUPTED_EXIT_CODE)
        if not self.asked:
            self.asked = True
            self._deadline = time.monotonic() + self._patience
            threading.Thread(target=self._stop_ranks, name="stop", daemon=True).start()
        elif number == signal.SIGINT:
            _send(signal.SIGINT, _ranks())
            self._deadline = min(self._deadline, time.monotonic() + IMPATIENT_SECONDS)

    def _stop_ranks(self) -> None:
        told: set[psutil.Process] = set()
        while time.monotonic() < self._deadline:
            # One may just be starting.
            new = [rank for rank in _ranks() if rank not in told]
            # Ranks, which a scheduler may have told as well, take a second SIGINT for impatience.
            _send(signal.SIGTERM, new)
            told.update(new)
            time.sleep(TELL_SECONDS)
        if left := _ranks():
            got = f"{len(left)} ranks did not end in time after they were asked to stop, and are killed"
            print(f"llmtrain: {got}; they have longer with STOP_TIMEOUT=seconds", file=sys.stderr)
            _send(signal.SIGKILL, left)


def _ranks() -> list[psutil.Process]:
    return psutil.Process().children()


def _send(number: signal.Signals, ranks: list[psutil.Process]) -> None:
    for rank in ranks:
        with suppress(psutil.Error):
            rank.send_signal(number)
