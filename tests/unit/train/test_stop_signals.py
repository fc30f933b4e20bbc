"""Being asked to stop: the first signal is answered, the second interrupts."""

from __future__ import annotations

import os
import signal

import pytest

from llmtrain.train.loop import STOPPING, stop_signals


@pytest.mark.parametrize("first", [signal.SIGINT, signal.SIGTERM])
def test_the_first_signal_is_answered_once_and_ctrl_c_after_it_interrupts(
    first: signal.Signals, capfd: pytest.CaptureFixture[str]
):
    before = signal.getsignal(signal.SIGINT)
    with pytest.raises(KeyboardInterrupt), stop_signals() as stop_requested:  # noqa: PT012
        assert not stop_requested()
        os.kill(os.getpid(), first)
        assert stop_requested()
        os.kill(os.getpid(), signal.SIGTERM)
        assert capfd.readouterr().err == STOPPING
        os.kill(os.getpid(), signal.SIGINT)
    assert "press Ctrl-C again" in STOPPING
    assert signal.getsignal(signal.SIGINT) is before


def test_one_rank_speaks(monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]):
    monkeypatch.setenv("WORLD_SIZE", "2")
    monkeypatch.setenv("RANK", "1")
    with stop_signals() as stop_requested:
        os.kill(os.getpid(), signal.SIGTERM)
        assert stop_requested()
    assert capfd.readouterr().err == ""
