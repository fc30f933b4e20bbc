"""What the launcher says in the environment, and what it must not say."""

from __future__ import annotations

from pathlib import Path

import pytest

from llmtrain.errors import LaunchError
from llmtrain.parallel import launcher


@pytest.mark.parametrize(
    ("environment", "message"),
    [
        ({"RANK": "x", "WORLD_SIZE": "2"}, "RANK: got 'x'; allowed: a whole number, 0 or more"),
        ({"RANK": "2", "WORLD_SIZE": "2"}, "RANK: got 2 with WORLD_SIZE=2; allowed: 0 to 1"),
        ({"RANK": "0", "WORLD_SIZE": "0"}, "WORLD_SIZE: got '0'; allowed: a whole number, 1 or more"),
        ({"RANK": "0", "WORLD_SIZE": "-1"}, "WORLD_SIZE: got '-1'"),
    ],
)
def test_what_is_no_rank(environment: dict[str, str], message: str, monkeypatch: pytest.MonkeyPatch):
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    with pytest.raises(LaunchError) as caught:
        launcher.rank()
    assert str(caught.value).startswith(message)


def test_alone_without_a_launcher(monkeypatch: pytest.MonkeyPatch):
    for name in ("RANK", "WORLD_SIZE", "LOCAL_RANK"):
        monkeypatch.delenv(name, raising=False)
    assert (launcher.rank(), launcher.world_size(), launcher.local_rank()) == (0, 1, 0)


@pytest.mark.parametrize(("visible", "expected"), [(None, "cuda"), ("0", "cuda"), ("", "cpu"), ("-1", "cpu")])
def test_hidden_gpus_are_not_planned_for(visible: str | None, expected: str, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(Path, "exists", lambda path: str(path) == "/proc/driver/nvidia/version")
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    if visible is not None:
        monkeypatch.setenv("CUDA_VISIBLE_DEVICES", visible)
    assert launcher.likely_device("auto") == expected
