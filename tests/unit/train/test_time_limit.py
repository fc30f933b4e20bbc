"""A run stops before its time is up, early enough for a save."""

from __future__ import annotations

from pathlib import Path

import pytest

from llmtrain.distributed import job_time
from llmtrain.distributed.restarts import ATTEMPT
from llmtrain.errors import ConfigError
from llmtrain.track.events import note_event, read_events
from llmtrain.train import time_limit
from llmtrain.train.time_limit import CLOSING_SECONDS, TimeLimit, end_of, refuse_if_too_short, seconds_of
from tests.support.fake_engine import FakeRun


@pytest.mark.parametrize(
    ("text", "seconds"),
    [
        *(("01:30:00", 5400), ("00:00:05", 5), ("2-01:00:00", 176400), ("90", 90), ("1.5", 1.5)),
        *(("1:5", None), ("", None), ("00:60:00", None), ("-5", None), ("1h", None), ("0x10", None)),
    ],
)
def test_forms(text: str, seconds: float | None) -> None:
    assert seconds_of(text) == seconds


def test_when_the_time_is_up(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(job_time.STARTED, "1000")
    monkeypatch.delenv(job_time.SLURM_END, raising=False)
    assert (end_of(None), end_of("60")) == (None, 1060)
    monkeypatch.setenv(job_time.SLURM_END, "5000")
    assert (end_of(None), end_of("00:01:00")) == (5000, 1060)


def test_time_is_left_for_saves_and_the_longest_step() -> None:
    now = [0.0]
    limit = TimeLimit(100.0, save_seconds=10.0, clock=lambda: now[0])
    stopped_at = None
    for step in range(100):
        now[0] += 8.0 if step in (0, 5) else 1.0
        if limit.asks_to_stop():
            stopped_at = now[0]
            break
    assert stopped_at == 100 - 2 * 10 - 8 - CLOSING_SECONDS, (
        "two saves, the longest step but the first, the end"
    )
    assert limit.asks_to_stop(), "it stays so"


def test_a_save_that_took_longer_counts() -> None:
    limit = TimeLimit(100.0, save_seconds=1.0, clock=lambda: 0.0)
    assert not limit.asks_to_stop()
    limit.saved(60.0)
    assert limit.asks_to_stop()
    assert not TimeLimit(None).asks_to_stop()


def test_before_a_save_is_measured_a_share_of_the_time_is_left(monkeypatch: pytest.MonkeyPatch) -> None:
    assert TimeLimit(40.0, clock=lambda: 0.0).needed_seconds == 10 + CLOSING_SECONDS
    assert TimeLimit(1e6, clock=lambda: 0.0).needed_seconds == time_limit.FIRST_SAVE_SECONDS + CLOSING_SECONDS


def test_a_limit_shorter_than_a_save_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv(job_time.STARTED, raising=False)
    refuse_if_too_short("3", tmp_path, 10)  # nothing was measured yet
    note_event(tmp_path, "save", 4, seconds=20.0)
    refuse_if_too_short("100000", tmp_path, 10)
    refuse_if_too_short("3", tmp_path, 4)  # nothing is left to train
    told = (
        r"train\.time_limit: got 3, of which 0\.0 s are left, while a save of this run took 20\.0 s; "
        r"allowed: more than 45\.0 s after the start; give the job more time"
    )
    with pytest.raises(ConfigError, match=told):
        refuse_if_too_short("3", tmp_path, 10)
    refuse_if_too_short("50", tmp_path, 10)
    with pytest.raises(ConfigError, match=r"allowed: more than 55\.0 s after the start"):
        refuse_if_too_short("50", tmp_path, 10, uploads=True)
    monkeypatch.setenv(ATTEMPT, "2")
    refuse_if_too_short("3", tmp_path, 10)  # it stops, to go on in another job
    monkeypatch.delenv(ATTEMPT)
    monkeypatch.setenv(job_time.STARTED, "1000")
    refuse_if_too_short("60", tmp_path, 10)  # over long since, but no mistake


def test_a_run_stops_by_itself_and_goes_on(
    corpus: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run = FakeRun(corpus, tmp_path / "run", monkeypatch)
    monkeypatch.setenv(job_time.STARTED, "1000")
    now = [1000.0]
    monkeypatch.setattr(TimeLimit.__init__, "__defaults__", (None, lambda: now[0]))

    def on_call(call: str) -> None:
        now[0] += 10.0 if call.startswith("train") else 0.0

    assert not run.start("train.time_limit=40", "checkpoint.every=null", on_call=on_call)
    assert len(run.calls) < 5
    stop = read_events(run.folder / "events.jsonl")[-1]
    assert (stop.kind, stop.facts) == ("stop", {"why": "time limit"})
    assert run.start("checkpoint.every=null")
    steps = [event.step for event in read_events(run.folder / "events.jsonl") if event.kind == "start"]
    assert steps == [0, stop.step]
