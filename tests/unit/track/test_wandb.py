"""Weights & Biases for real, offline: what a run wrote is read back by W&B's own reader."""

import json
import os
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from llmtrain.errors import ConfigError
from llmtrain.track.config import WandbConfig
from llmtrain.track.weights_and_biases import WandbTracker, last_logged_step
from tests.support.warm import finish, start


def run(
    run_dir: Path,
    *,
    last_step: int,
    resume_step: int | None = None,
    state: Any = None,
    seconds_before_kill: float | None = None,
    **environment: str,
) -> dict[str, Any]:
    """One process' life; returns the trackers' state."""
    arguments = json.dumps([str(run_dir), resume_step, state, last_step, seconds_before_kill])
    process = start(
        arguments, program="tests.support.tracked_run", **{"WANDB_MODE": "offline", **environment}
    )
    [done] = finish([process], timeout=120)
    assert done.returncode == (0 if seconds_before_kill is None else -signal.SIGKILL), done.stderr
    return json.loads(next(line for line in done.stdout.splitlines() if line.startswith("{")))


def records(run_dir: Path) -> list[dict[str, Any]]:
    """All records of all of the run's logs, in the order of writing, by W&B's own reader."""
    found = []
    for path in sorted(run_dir.glob("wandb/offline-run-*/*.wandb"), key=os.path.getmtime):
        output = subprocess.run(
            [sys.executable, "-m", "wandb", "leet", "inspect", "--json", str(path)],
            capture_output=True,
            text=True,
            timeout=120,
            check=True,
        ).stdout
        found += [json.loads(line) for line in output.splitlines()]
    return found


def history(run_dir: Path) -> list[dict[str, Any]]:
    return history_of(records(run_dir))


def history_of(found: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """The metrics of each step that records hold."""
    items = [r["history"] for r in found if r["type"] == "history"]
    return [
        {"step": item["step"]["num"]} | {k: v for k, v in item["item"].items() if k[0] != "_"}
        for item in items
    ]


def expected(steps: range) -> list[dict[str, Any]]:
    return [
        {"step": step, "loss": "NaN" if step == 2 else pytest.approx(1 / step)}
        | ({"validation_loss": 10.0 * step} if step % 2 == 0 else {})
        for step in steps
    ]


@pytest.mark.slow
def test_a_killed_run_goes_on_under_its_id_with_every_step_once(tmp_path: Path) -> None:
    state = run(tmp_path, last_step=8, seconds_before_kill=1.5, WANDB_X_TRANSACTION_LOG_FLUSH_INTERVAL="0.3")
    run_id = state["wandb"]["run_id"]
    # W&B writes a step when the next one begins: the last one dies with the process.
    assert last_logged_step(tmp_path, run_id) == 7
    assert history(tmp_path) == expected(range(1, 8))

    resumed_state = run(tmp_path, last_step=10, resume_step=5, state=state)
    assert resumed_state == state
    found = records(tmp_path)
    assert history_of(found) == expected(range(1, 11))
    runs = [r["run"] for r in found if r["type"] == "run"]
    assert {r["run_id"] for r in runs} == {run_id}
    assert {r["display_name"] for r in runs} == {"the-run"}
    assert last_logged_step(tmp_path, run_id) == 10


@pytest.mark.slow
def test_steps_that_died_in_memory_are_filled_in(tmp_path: Path) -> None:
    state = run(tmp_path, last_step=8, seconds_before_kill=0.0)
    assert last_logged_step(tmp_path, state["wandb"]["run_id"]) == -1
    run(tmp_path, last_step=10, resume_step=5, state=state)
    assert history(tmp_path) == expected(range(1, 11))


@pytest.mark.slow
def test_pictures_are_kept_with_their_step(tmp_path: Path) -> None:
    run(tmp_path, last_step=12)
    last = history(tmp_path)[-1]
    assert last["step"] == 12
    assert last["loss"] == pytest.approx(1 / 12)
    for name in ("confusion", "calibration"):
        assert last[f"{name}._type"] == "image-file"
        [file] = tmp_path.glob(f"wandb/offline-run-*/files/{last[f'{name}.path']}")
        assert file.read_bytes().startswith(b"\x89PNG")


@pytest.mark.slow
def test_offline_log_is_read_over_many_blocks_and_through_a_torn_end(tmp_path: Path) -> None:
    run_id = run(tmp_path, last_step=400)["wandb"]["run_id"]
    (path,) = tmp_path.glob("wandb/offline-run-*/*.wandb")
    assert path.stat().st_size > 2 * 32768
    assert last_logged_step(tmp_path, run_id) == 400
    content = path.read_bytes()
    path.write_bytes(content[: 32768 + 100])
    torn = last_logged_step(tmp_path, run_id)
    assert 0 < torn < 400
    assert torn == max(item["step"] for item in history(tmp_path))


def tracker(run_dir: Path, config: WandbConfig) -> WandbTracker:
    return WandbTracker(
        config, run_dir=run_dir, run_name="r", resolved_config={}, resume_step=3, run_id="abc", history=None
    )


def test_disabled_keeps_the_run_id_for_later(tmp_path: Path) -> None:
    disabled = tracker(tmp_path, WandbConfig(mode="disabled"))
    disabled.log(4, {"loss": 1.0})
    assert disabled.state() == {"run_id": "abc"}
    disabled.close(failed=True)
    assert not list(tmp_path.iterdir())


def test_no_account_is_one_line(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.delenv("WANDB_MODE", raising=False)
    monkeypatch.delenv("WANDB_API_KEY", raising=False)
    with pytest.raises(ConfigError) as caught:
        tracker(tmp_path, WandbConfig())
    assert str(caught.value) == (
        "track.wandb: got No API key configured. Use `wandb login` to log in; "
        "correct it, or give track.wandb.mode=offline"
    )


@pytest.mark.slow
def test_without_a_network_the_run_is_kept_offline(tmp_path: Path) -> None:
    state = run(
        tmp_path,
        last_step=3,
        HOME=str(tmp_path),
        WANDB_MODE="online",
        WANDB_API_KEY="0" * 40,
        WANDB_BASE_URL="http://127.0.0.1:9",
        WANDB_INIT_TIMEOUT="1",
    )
    assert state["wandb"]["run_id"]
    assert history(tmp_path) == expected(range(1, 4))
