"""Streams of a corpus that comes from elsewhere."""

from __future__ import annotations

import copy
import hashlib
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from llmtrain.data.loader import Loader
from llmtrain.errors import UserError
from llmtrain.train.resolve import resolve
from tests.support.training import TINY_GPT, composed, open_loader

STEPS = 120
"""More than two epochs of the fixture `prepared`."""


def shard(prepared: Path, number: int) -> str:
    """The path of a training shard below the server's folder."""
    manifest = json.loads((prepared / "manifest.json").read_text())
    return f"corpus/{manifest['splits']['train']['shards'][number]['file']}"


def loader_of(path: str | Path, folder: Path, *overrides: str) -> Loader:
    """Of the corpus at `path`, with its cache in `folder`."""
    cache = ("data.cache.timeout=1", "data.cache.retries=3")
    mapping = copy.deepcopy(composed((*TINY_GPT, "data.shuffle_tars=3", *cache, *overrides)))
    mapping["data"]["path"] = str(path)
    mapping["data"]["cache"]["dir"] = str(folder)
    found = open_loader(resolve(mapping))
    assert isinstance(found, Loader)
    return found


def stream(loader: Loader, steps: int = STEPS) -> list[str]:
    """A hash of all that each step gives to a model."""
    found = []
    for _, batch in zip(range(steps), loader.steps(), strict=False):
        digest = hashlib.sha256()
        for micro_batch in batch.micro_batches:
            for name, tensor in sorted(micro_batch.batch.items()):
                digest.update(name.encode() + tensor.numpy().tobytes())
        found.append(digest.hexdigest())
    return found


def refusal(action: Callable[[], Any]) -> str:
    """The one line with which the action is refused."""
    with pytest.raises(UserError) as caught:
        action()
    message = str(caught.value)
    assert len(message.splitlines()) == 1
    return message
