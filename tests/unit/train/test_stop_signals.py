"""Being asked to stop: the first signal is answered, the second interrupts."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time

import pytest

from llmtrain.distributed.stopping import SIGNALS, STOPPING, StopRequest


@pytest.mark.parametrize("first", SIGNALS)
def test_the_first_signal_is_answered_once_and_ctrl_c_after_it_interrupts(
    first: signal.Signals, capfd: pytest.CaptureFixture[str]
):
    before = [signal.getsignal(number) for number in SIGNALS]
    request = StopRequest()
    with pytest.raises(KeyboardInterrupt), request.listening():  # noqa: PT012
        request.save_first()
        assert not request.asked
        os.kill(os.getpid(), first)
        assert request.asked
        os.kill(os.getpid(), signal.SIGTERM)
        os.kill(os.getpid(), signal.SIGUSR1)
        assert capfd.readouterr().err == STOPPING
        os.kill(os.getpid(), signal.SIGINT)
    assert "press Ctrl-C again" in STOPPING
    assert [signal.getsignal(number) for number in SIGNALS] == before


def test_one_rank_speaks(monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]):
    monkeypatch.setenv("WORLD_SIZE", "2")
    monkeypatch.setenv("RANK", "1")
    request = StopRequest()
    with request.listening():
        request.save_first()
        os.kill(os.getpid(), signal.SIGTERM)
        assert request.asked
    assert capfd.readouterr().err == ""


IN_C = """
import ctypes
from llmtrain.distributed.stopping import request

with request.listening():
    print("listening", flush=True)
    lock, mutex = ctypes.CDLL(None).pthread_mutex_lock, ctypes.create_string_buffer(64)
    lock(mutex)
    lock(mutex)
"""
COMPOSING = """
import time
from llmtrain.cli import main as cli

def run_verb(*_):
    print("composing", flush=True)
    time.sleep(60)

cli.run_verb = run_verb
cli.main(["train"])
"""


@pytest.mark.parametrize("program", [IN_C, COMPOSING], ids=["in C", "composing"])
@pytest.mark.parametrize("number", SIGNALS)
def test_while_there_is_nothing_to_save_a_process_ends_at_once(number: signal.Signals, program: str):
    """Also within a call into C that goes on after a signal, and before the configuration is known."""
    command = [sys.executable, "-c", program]
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None
        assert process.stderr is not None
        process.stdout.readline()
        time.sleep(0.1)
        process.send_signal(number)
        try:
            assert process.wait(50) == 75
        finally:
            process.kill()
        assert "stopped on request before the first step" in process.stderr.read()
