"""Handle the signals that ask this process to save its work and exit.

Schedulers send SIGTERM or, on request of a Slurm user, SIGUSR1; a person presses Ctrl-C.
"""

from __future__ import annotations

import os
import signal
import socket
import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress

from llmtrain.distributed import launcher
from llmtrain.errors import INTERRUPTED_EXIT_CODE

SIGNALS = (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1)
STOPPING = "\nllmtrain: stopping and saving; press Ctrl-C again to quit without saving\n"
NOTHING_TO_SAVE = "\nllmtrain: stopped on request before the first step; there was nothing new to save\n"


class StopRequest:
    """Records whether this process was asked to stop.

    Before `save_first` is called there is nothing to save, and a request ends the process at once. After it,
    a request is recorded in `asked`, and a second Ctrl-C raises KeyboardInterrupt.
    """

    def __init__(self) -> None:
        self.asked = False
        self._saves_first = False
        self.farewell = NOTHING_TO_SAVE
        """The line printed when a request ends the process at once."""

    @contextmanager
    def listening(self) -> Iterator[None]:
        """Treat signals as requests to stop. Call this in the main thread."""
        self.asked = self._saves_first = False
        self.farewell = NOTHING_TO_SAVE
        with listening(SIGNALS, on_signal=self._on_signal, at_once=self._end_at_once):
            yield

    def save_first(self) -> None:
        """Let later requests wait until the work is saved."""
        self._saves_first = True

    def _on_signal(self, number: int) -> None:
        if number == signal.SIGINT and self.asked:
            raise KeyboardInterrupt
        if not self.asked and self._saves_first:
            _say(STOPPING)
        self.asked = True

    def _end_at_once(self, _number: int) -> None:
        if not self._saves_first:
            _say(self.farewell)
            os._exit(INTERRUPTED_EXIT_CODE)


request = StopRequest()
"""The stop request of this process."""


@contextmanager
def listening(
    numbers: Sequence[signal.Signals],
    on_signal: Callable[[int], None] = lambda number: None,
    at_once: Callable[[int], None] = lambda number: None,
) -> Iterator[None]:
    """Handle signals: call `on_signal` in the main thread, once a running C call has returned, and `at_once`
    in a separate thread, whatever the main thread does."""
    ours, theirs = socket.socketpair()
    theirs.setblocking(False)

    def read() -> None:
        # Python writes each signal's number here.
        with ours:
            while received := ours.recv(64):
                for number in received:
                    if number in numbers:
                        at_once(number)

    before = {number: signal.signal(number, lambda number, _frame: on_signal(number)) for number in numbers}
    wakeup = signal.set_wakeup_fd(theirs.fileno(), warn_on_full_buffer=False)
    threading.Thread(target=read, name="signals", daemon=True).start()
    try:
        yield
    finally:
        signal.set_wakeup_fd(wakeup)
        for number, handler in before.items():
            signal.signal(number, handler)
        theirs.close()


def _say(text: str) -> None:
    if launcher.rank() == 0:
        # print() is not reentrant, and the main thread may be inside one. The reader of stderr may be gone.
        with suppress(OSError):
            os.write(2, text.encode())


def asked() -> bool:
    """Return whether this process was asked to stop."""
    return request.asked
