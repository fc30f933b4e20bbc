import struct
from pathlib import Path

import pytest
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from llmtrain.config import decode
from llmtrain.errors import ConfigError
from llmtrain.track.config import JsonlConfig, PictureConfig, TrackConfig
from llmtrain.track.picture import read_curves
from llmtrain.track.trackers import Trackers, open_trackers


def opened(run_dir: Path, resume_step: int | None) -> Trackers:
    return open_trackers(
        TrackConfig(jsonl=JsonlConfig(), picture=PictureConfig()),
        run_dir=run_dir,
        run_name="film reviews",
        resolved_config={},
        resume_step=resume_step,
        state=None,
    )


def test_the_picture_of_a_resumed_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Steps of before the resume are there, those that the killed run had past its checkpoint are not."""
    drawn: list[Axes] = []
    save = Figure.savefig
    monkeypatch.setattr(
        Figure, "savefig", lambda self, *a, **k: (drawn.extend(self.axes), save(self, *a, **k))
    )
    killed = opened(tmp_path, None)
    killed.log(0, {"validation_loss": 9.0})
    for step in (1, 2, 3):
        killed.log(step, {"loss": 9.0 - step})
    resumed = opened(tmp_path, 2)
    resumed.log(3, {"loss": 5.0})
    resumed.log(4, {"loss": float("nan")})
    resumed.log(4, {"validation_loss": 5.5})
    resumed.close(failed=False)

    curves = {"loss": ([1, 2, 3], [8.0, 7.0, 5.0]), "validation_loss": ([0, 4], [9.0, 5.5])}
    assert read_curves(tmp_path / "metrics.jsonl") == curves
    (axes,) = drawn
    lines = [tuple(map(list, line.get_data())) for line in axes.get_lines()]
    assert lines == [curves["loss"], curves["validation_loss"]]
    assert axes.get_title() == "film reviews"
    assert axes.get_xlabel() == "optimizer steps"
    assert "nats" in axes.get_ylabel()
    png = (tmp_path / "loss.png").read_bytes()
    assert png.startswith(b"\x89PNG")
    assert struct.unpack(">II", png[16:24]) == (960, 600)


def test_a_picture_needs_the_metrics_file() -> None:
    with pytest.raises(ConfigError, match=r"picture.*track=\[jsonl,picture\]"):
        decode(TrackConfig, {"picture": {}})
