import logging
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import pytest
import yaml
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from llmtrain.config import decode
from llmtrain.errors import Problem, TrainingError
from llmtrain.track.base import WrittenText
from llmtrain.track.config import JsonlConfig, TensorBoardConfig, TrackConfig
from llmtrain.track.trackers import Trackers, open_trackers

CONF = Path(__file__).parents[3] / "conf"


def opened(config: TrackConfig, run_dir: Path, resume_step: int | None = None, **settings: Any) -> Trackers:
    return open_trackers(
        config,
        run_dir=run_dir,
        run_name="test",
        resolved_config={"seed": 1},
        resume_step=resume_step,
        state=settings.get("state"),
    )


class Recorder:
    """A tracker whose calls raise what it is given."""

    def __init__(self, error: Exception | None = None) -> None:
        self.error = error
        self.calls: list[object] = []

    def _call(self, *arguments: object) -> dict[str, Any]:
        self.calls.append(arguments)
        if self.error is not None:
            raise self.error
        return {"calls": len(self.calls)}

    def log(self, step: int, metrics: Mapping[str, float]) -> None:
        self._call(step, dict(metrics))

    def show(self, step: int, pictures: Mapping[str, bytes]) -> None:
        self._call(step, dict(pictures))

    def write(self, step: int, texts: Sequence[WrittenText]) -> None:
        self._call(step, list(texts))

    def state(self) -> dict[str, Any]:
        return self._call()

    def alert(self, title: str, text: str) -> None:
        self._call(title, text)

    def keep(self, step: int, checkpoint: Path) -> None:
        self._call(step, checkpoint)

    def close(self, failed: bool) -> None:
        self._call(failed)


def of(earlier: Mapping[str, Any] | None = None, **trackers: Recorder) -> Trackers:
    group = Trackers(earlier)
    for name, tracker in trackers.items():
        group.open(name, lambda tracker=tracker: tracker)
    return group


def test_a_failing_tracker_warns_once_and_stops_nobody(caplog: pytest.LogCaptureFixture) -> None:
    broken, working = Recorder(ConnectionError("no route")), Recorder()
    trackers = of(wandb=broken, jsonl=working)
    with caplog.at_level(logging.WARNING):
        trackers.log(1, {"loss": 1.0})
        trackers.log(2, {"loss": 0.5})
        trackers.show(2, {"confusion": b"PNG"})
        state = trackers.state()
        trackers.close(failed=True)
    seen = [(1, {"loss": 1.0}), (2, {"loss": 0.5}), (2, {"confusion": b"PNG"}), (), (True,)]
    assert working.calls == seen
    assert len(broken.calls) == 5
    assert [r.getMessage() for r in caplog.records] == [
        "track.wandb failed, training continues: ConnectionError: no route"
    ]
    assert state == {"wandb": {}, "jsonl": {"calls": 4}}


def test_a_full_disk_passes() -> None:
    trackers = of(jsonl=Recorder(TrainingError(Problem("metrics.jsonl", "no space"))))
    with pytest.raises(TrainingError):
        trackers.log(1, {})


def test_a_tracker_that_is_off_or_fails_finds_its_state_again() -> None:
    earlier = {"wandb": {"run_id": "abc"}, "other": {"x": 1}}
    assert of(earlier, jsonl=Recorder()).state() == {**earlier, "jsonl": {"calls": 1}}
    assert of(earlier, wandb=Recorder(OSError("gone"))).state() == earlier


def test_a_tracker_that_cannot_open_is_left_out(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    (tmp_path / "tensorboard").write_text("a file where the folder should be")
    config = TrackConfig(jsonl=JsonlConfig(), tensorboard=TensorBoardConfig())
    trackers = opened(config, tmp_path)
    trackers.log(1, {"loss": 1.0})
    trackers.close(failed=False)
    (record,) = caplog.records
    assert record.getMessage().startswith("track.tensorboard failed, training continues: ")
    assert (tmp_path / "metrics.jsonl").read_text() == '{"step": 1, "loss": 1.0}\n'


def test_no_tracker_is_allowed(tmp_path: Path) -> None:
    trackers = opened(TrackConfig(), tmp_path)
    trackers.log(1, {"loss": 1.0})
    assert trackers.state() == {}
    trackers.close(failed=False)
    assert not list(tmp_path.iterdir())


NAMES = ("jsonl", "tensorboard", "wandb", "picture")


@pytest.mark.parametrize("name", NAMES)
def test_presets_turn_on_their_tracker_alone(name: str) -> None:
    preset = yaml.safe_load((CONF / "track" / f"{name}.yaml").read_text())
    config = decode(TrackConfig, {"jsonl": {}, **preset})
    assert {n for n in NAMES if getattr(config, n) is not None} == {"jsonl", name}


def test_tensorboard_resumes_without_what_lay_past_the_checkpoint(tmp_path: Path) -> None:
    config = TrackConfig(jsonl=JsonlConfig(), tensorboard=TensorBoardConfig())
    trackers = opened(config, tmp_path)
    for step in range(1, 9):
        trackers.log(step, {"loss": float(step)})
    trackers.log(5, {"validation_loss": 50.0})
    # A kill: whatever was flushed by the last state() stays, nothing is closed.
    state = trackers.state()
    resumed = opened(config, tmp_path, resume_step=5, state=state)
    for step in range(6, 10):
        resumed.log(step, {"loss": float(10 * step)})
    resumed.close(failed=False)
    events = EventAccumulator(str(tmp_path / "tensorboard")).Reload()
    assert [(e.step, e.value) for e in events.Scalars("loss")] == [
        *[(s, float(s)) for s in range(1, 6)],
        *[(s, 10.0 * s) for s in range(6, 10)],
    ]
    assert [(e.step, e.value) for e in events.Scalars("validation_loss")] == [(5, 50.0)]
    assert '"seed": 1' in events.Tensors("config/text_summary")[0].tensor_proto.string_val[0].decode()
