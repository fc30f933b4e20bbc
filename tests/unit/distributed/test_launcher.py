"""What the launcher says in the environment, and what it must not say."""

from __future__ import annotations

from pathlib import Path

import pytest

from llmtrain.distributed import launcher
from llmtrain.errors import LaunchError


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


@pytest.mark.parametrize(
    ("visible", "torch", "expected"),
    [
        (None, "2.13.0+cu130", "cuda"),
        ("0", "2.13.0", "cuda"),
        ("", "2.13.0", "cpu"),
        ("-1", "2.13.0", "cpu"),
        (None, "2.13.0+cpu", "cpu"),
    ],
)
def test_only_gpus_that_torch_can_take_are_planned_for(
    visible: str | None, torch: str, expected: str, monkeypatch: pytest.MonkeyPatch
):
    _install_driver(visible, monkeypatch)
    monkeypatch.setattr(launcher.metadata, "version", lambda name: torch)
    assert launcher.likely_device("auto") == expected
    assert launcher.likely_device("cpu") == "cpu"


@pytest.mark.parametrize("visible", [None, "-1"])
def test_a_gpu_that_torch_does_not_see_is_warned_of(
    visible: str | None, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
):
    from llmtrain.distributed import processes

    _install_driver(visible, monkeypatch)
    monkeypatch.setattr(processes.torch.cuda, "is_available", lambda: False)
    assert processes.pick_device("auto").type == "cpu"
    assert ("sees no GPU: the CPU is used" in capsys.readouterr().err) == (visible is None)
    assert processes.pick_device("cpu").type == "cpu"
    assert capsys.readouterr().err == ""


def _install_driver(visible: str | None, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Path, "exists", lambda path: str(path) == "/proc/driver/nvidia/version")
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    if visible is not None:
        monkeypatch.setenv("CUDA_VISIBLE_DEVICES", visible)
