"""What a real run leaves of its profile, and what it tells W&B besides metrics."""

from __future__ import annotations

import gzip
import json
from pathlib import Path

import pytest

from llmtrain.errors import UserError
from llmtrain.track.alerts import alert_of, alert_of_restart
from llmtrain.track.events import Event
from llmtrain.train.resolve import resolve
from tests.faults.test_spikes import SIZE, SPOILS, arguments
from tests.support.training import TINY_GPT, compose
from tests.support.warm import PRELUDE, llmtrain, on_ranks
from tests.unit.track.test_wandb import records


@pytest.mark.slow
def test_a_profile_of_some_steps_on_some_ranks(corpus: Path, tmp_path: Path):
    run = tmp_path / "run"
    options = ("train.steps=5", "profile.steps=[3,4]", "profile.ranks=[1]", "engine=local")
    for done in on_ranks(2, *arguments(corpus, run, *options)):
        assert done.returncode == 0, done.stderr
    [trace] = (run / "profile").iterdir()
    assert trace.name == "rank1.json.gz"
    events = json.loads(gzip.decompress(trace.read_bytes()))["traceEvents"]
    steps = [event for event in events if event.get("name", "").startswith("Optimizer.step#")]
    assert len(steps) == 2
    assert any(event.get("name") == "[memory]" for event in events)


@pytest.mark.slow
def test_alerts_and_artifacts(corpus: Path, tmp_path: Path):
    """Of a run with bad steps that is stopped by one more, and resumed."""
    run, prelude = tmp_path / "run", tmp_path / "prelude.py"
    prelude.write_text(SPOILS.format(first=7 * SIZE, last=9 * SIZE))
    options = [
        "track=[jsonl,wandb]",
        "track.alerts=true",
        "track.wandb.artifacts=true",
        "train.on_spike=skip",
    ]
    environment = {"WANDB_MODE": "offline", PRELUDE: str(prelude)}
    failed = llmtrain(*arguments(corpus, run, *options), **environment)
    assert failed.returncode == 2, failed.stderr
    environment.pop(PRELUDE)
    resumed = llmtrain(*arguments(corpus, run, *options), **environment)
    assert resumed.returncode == 0, resumed.stderr
    found = records(run)
    titles = [record["alert"]["title"] for record in found if record["type"] == "alert"]
    assert titles == ["default bad step", "default failed", "default restarted"]
    texts = [record["alert"]["text"] for record in found if record["type"] == "alert"]
    assert texts[0].startswith("step 8: gradient norm")
    assert "bad steps in a row" in texts[1]
    assert texts[2].startswith("from step 6, after fail (step 9")
    kept = [record for record in found if "artifact" in record["type"]]
    assert len(kept) >= 4, {record["type"] for record in found}


def test_which_events_are_told():
    assert alert_of("run", "save", 10, {}) is None
    assert alert_of("run", "skip", 1200, {"why": "loss nan"}) == ("run bad step", "step 1,200: loss nan")
    assert alert_of("run", "hang", None, {"rank": 3}) == ("run hangs", "rank 3")
    before = [Event("hang", 0.0, 7, {"why": "rank 3 is behind"}), Event("save", 0.0, 8)]
    assert alert_of_restart("run", 6, before) == (
        "run restarted",
        "from step 6, after hang (step 7: rank 3 is behind)",
    )
    assert alert_of_restart("run", 6, [Event("start", 0.0, 0)])[1] == "from step 6, after start"


@pytest.mark.parametrize(
    ("overrides", "words"),
    [
        ("profile.steps=[5]", "profile.steps: got [5]; allowed: [FIRST,LAST] from 1 on, or []"),
        ("profile.steps=[1,500]", "profile.steps: got '500 steps'; allowed: 100 steps at most"),
        ("profile.steps=[2000,2001]", "allowed: steps up to train.steps=1000"),
        ("profile.steps=[1,2] profile.ranks=[1]", "profile.ranks: got [1]; allowed: 0 to 0"),
    ],
)
def test_refusals(corpus: Path, overrides: str, words: str):
    with pytest.raises(UserError) as caught:
        resolve(compose([*TINY_GPT, f"data.path={corpus}", *overrides.split()]))
    assert words in str(caught.value)
