"""The watch of a run opens in one piece, or says why not."""

from __future__ import annotations

import os
from contextlib import suppress
from pathlib import Path

import pytest
import torch

from llmtrain.errors import TrainingError
from llmtrain.watch import neighbours
from llmtrain.watch.config import DebugConfig, WatchConfig
from llmtrain.watch.watch import watched


def test_a_memory_without_room_is_told_before_anything_is_trained(
    small_disk: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    """As /dev/shm of a container: a file in it may be made, but ends the process where it is written to."""
    monkeypatch.setattr(neighbours, "MEMORY", small_disk)
    with suppress(OSError), (small_disk / "others").open("wb", buffering=0) as file:
        while True:
            file.write(bytes(4096))
    told = (
        rf"{small_disk}: got a full disk \(No space left on device, 0 MiB free\); make room there, or train"
    )
    settings = (WatchConfig(), DebugConfig(), tmp_path, torch.device("cpu"), [[0]])
    with pytest.raises(TrainingError, match=told), watched(*settings):
        raise AssertionError("it begins")
    os.remove(small_disk / "others")
    with watched(*settings):
        assert list(small_disk.glob("llmtrain-watch-*/rank0"))
    assert not list(small_disk.iterdir())
