import errno
import json
import math
import os
from pathlib import Path

import pytest

from llmtrain.errors import TrainingError
from llmtrain.track.jsonl import JsonlTracker, read_metrics


def steps(path: Path) -> list[int]:
    return [record["step"] for record in read_metrics(path)]


def test_one_object_a_line_at_once(tmp_path: Path) -> None:
    path = tmp_path / "metrics.jsonl"
    tracker = JsonlTracker(path, None)
    tracker.log(1, {"loss": 2.5, "tokens": 7})
    assert path.read_text() == '{"step": 1, "loss": 2.5, "tokens": 7}\n'
    tracker.log(1, {"validation_loss": 3.0})
    tracker.close(failed=False)
    assert list(read_metrics(path)) == [
        {"step": 1, "loss": 2.5, "tokens": 7},
        {"step": 1, "validation_loss": 3.0},
    ]


def test_values_that_are_not_finite_are_null(tmp_path: Path) -> None:
    path = tmp_path / "metrics.jsonl"
    tracker = JsonlTracker(path, None)
    tracker.log(3, {"loss": math.nan, "grad_norm": -math.inf, "lr": 0.0})
    tracker.close(failed=True)

    def refuse(constant: str) -> None:
        raise AssertionError(f"{constant} is not JSON")

    assert json.loads(path.read_text(), parse_constant=refuse) == {
        "step": 3,
        "loss": None,
        "grad_norm": None,
        "lr": 0.0,
    }


def test_a_resumed_run_drops_what_lies_past_its_checkpoint_and_a_torn_line(tmp_path: Path) -> None:
    path = tmp_path / "metrics.jsonl"
    tracker = JsonlTracker(path, None)
    for step in range(1, 9):
        tracker.log(step, {"loss": 1 / step})
    with path.open("a") as file:
        file.write('{"step": 5, "loss": 0.')
    kept = path.read_text().splitlines()[:5]
    tracker = JsonlTracker(path, 5)
    assert path.read_text().splitlines() == kept
    tracker.log(6, {"loss": 0.1})
    tracker.close(failed=False)
    assert steps(path) == [1, 2, 3, 4, 5, 6]
    assert [p.name for p in tmp_path.iterdir()] == ["metrics.jsonl"]


def test_a_torn_line_that_is_valid_json_is_dropped(tmp_path: Path) -> None:
    path = tmp_path / "metrics.jsonl"
    path.write_text('{"step": 1}\n{"step": 2}')
    JsonlTracker(path, 9).log(10, {})
    assert steps(path) == [1, 10]


def test_a_fresh_run_starts_anew(tmp_path: Path) -> None:
    path = tmp_path / "metrics.jsonl"
    path.write_text('{"step": 0}\n{"step": 1}\n')
    JsonlTracker(path, None).log(1, {"loss": 1.0})
    assert path.read_text() == '{"step": 1, "loss": 1.0}\n'


def test_a_kill_while_dropping_leaves_the_old_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "metrics.jsonl"
    path.write_text('{"step": 1}\n{"step": 2}\n')
    monkeypatch.setattr(os, "replace", lambda *_: (_ for _ in ()).throw(KeyboardInterrupt))
    with pytest.raises(KeyboardInterrupt):
        JsonlTracker(path, 1)
    assert steps(path) == [1, 2]


def test_a_full_disk_stops_training() -> None:
    tracker = JsonlTracker.__new__(JsonlTracker)
    tracker._path, tracker._file = Path("/dev/full"), os.open("/dev/full", os.O_WRONLY)
    with pytest.raises(TrainingError, match="No space left") as caught:
        tracker.log(1, {"loss": 1.0})
    os.close(tracker._file)
    assert isinstance(caught.value.__cause__, OSError)
    assert caught.value.__cause__.errno == errno.ENOSPC
    assert len(str(caught.value).splitlines()) == 1


def test_a_folder_that_cannot_be_written_is_one_line(tmp_path: Path) -> None:
    with pytest.raises(TrainingError) as caught:
        JsonlTracker(tmp_path / "missing" / "metrics.jsonl", None)
    assert str(tmp_path / "missing") in str(caught.value)
